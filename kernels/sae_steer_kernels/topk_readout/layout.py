"""What ``topk_readout`` keeps of a dictionary's activations: the two largest of each group."""

GROUP = 32  # features; a tile of the encode product holds whole groups
