"""The same work done by this project and by what PyTorch projects use, in turns: see `mer-r1 bench`.

`text` and `omni` run our own programs, `text_torch` and `omni_torch` the others'; only the last two need torch.
"""
