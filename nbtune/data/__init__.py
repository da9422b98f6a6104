"""From a file, a name or rows in memory to examples of tokens that carry loss exactly where the model answers.

    data = load_examples(DataSpec(source="stdlib-docs"), tokenizer, max_length=512)
    batches = Batches(data.train, batch_size=2, max_length=512, packing=True, seed=0)
    for rows in batches.epoch(0):
        batch = collate([[data.train[index] for index in row] for row in rows])

Loss is carried by what the assistant says and by the token that ends its turn, nothing else.
"""

from nbtune.data.dataset import Dataset, Rows, load_examples, read_rows
from nbtune.data.formats import Chat
from nbtune.data.packing import Batch, Batches, collate, pack
from nbtune.data.render import Example, encode, encode_many
from nbtune.data.sources import from_text
from nbtune.data.templates import Finding, check_template

__all__ = [
    "Batch",
    "Batches",
    "Chat",
    "Dataset",
    "Example",
    "Finding",
    "Rows",
    "check_template",
    "collate",
    "encode",
    "encode_many",
    "from_text",
    "load_examples",
    "pack",
    "read_rows",
]
