"""The settings of each method, one file per family; the equations are in methods/. They import no torch.

Names and defaults are those of peft 0.21. `fan_in_fan_out` is written for PEFT and never read: a layer shows by its
kind how it stores its weight.
"""
