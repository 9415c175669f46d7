"""Where tensors live."""

import torch


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises ValueError for one that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but torch {torch.__version__} finds no GPU here; "
            "use device: auto or cpu"
        )
    return device
