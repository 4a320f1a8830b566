"""What `nvidia-smi` prints on nodes."""

A100S = "".join(
    f"{n}, GPU-{n}c8f6de6-41b1-4b6e-a5a7-0c2e2f6f3a1{n}, NVIDIA A100-SXM4-80GB, 81920, 580.65.06\n" for n in range(4)
)
MIGS = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0c8f6de6-41b1-4b6e-a5a7-0c2e2f6f3a10)
  MIG 3g.40gb     Device  0: (UUID: MIG-1ab0b8a1-51e8-5ca3-aa1c-5d5a1c4a8c55)
  MIG 1g.10gb     Device  1: (UUID: MIG-2ee5a2f1-cf05-5c7d-9a0f-d9ab2a0f0f10)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1c8f6de6-41b1-4b6e-a5a7-0c2e2f6f3a11)
"""
