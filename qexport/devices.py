"""Which device a name means, checked before anything is loaded for it."""

from qexport.errors import UsageError


def device_of(name: str | None) -> str:
    """The device that a `--device` means; `auto` and None are a GPU where there is one, else the CPU.

    Raises:
        UsageError: there is no such device, or none of that kind here.
    """
    import torch

    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    assert name is not None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N.") from None
    if device.type == "cpu":
        return "cpu"
    if device.type == "meta":
        raise UsageError("--device meta: nothing can be computed there. Use auto, cpu, cuda or cuda:N.")
    module = getattr(torch, device.type, None)
    count = module.device_count() if module is not None and hasattr(module, "device_count") else 0
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name}: this torch sees {count} such devices here. Use --device cpu, or auto.")
    return str(device)
