import torch

# Test processes run side by side, and one thread is the fastest for networks of this size anyway.
torch.set_num_threads(1)
