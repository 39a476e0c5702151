import os

import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in Triton's interpreter, which is chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A first call may build caches; deadlines would make slow machines fail.
settings.register_profile("veerloss", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("veerloss")
