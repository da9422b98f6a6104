"""The settings of each method; one file per method, beside its equation in methods/. They import no torch."""
