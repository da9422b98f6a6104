"""What the modules of a base model are, whoever asks: a layer's sizes and weight, also quantised, and its place in the
structure (projections, norms, values). `peft` adapts them, the training core replaces them.
"""
