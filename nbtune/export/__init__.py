"""Take a trained model home: the adapter, the merged model, or a GGUF file, each held against the original.

    done = export(run, "merged", "my-model")                    # a folder for plain transformers
    done = export("runs/amber-heron", "gguf", "my-model.gguf", dtype="q8_0")
    done.proof.largest_difference, done.proof.greedy_agree

What was found stands in `export.json` beside what was written.
"""

from nbtune.export.exporter import export
from nbtune.export.outcome import Export, report_path
from nbtune.export.precision import FORMATS
from nbtune.export.proof import Proof

__all__ = ["FORMATS", "Export", "Proof", "export", "report_path"]
