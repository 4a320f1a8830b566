"""The GPUs that this process may use; see `kdrl_core.models.devices`."""

from kdrl_core.models.devices import Gpu, gpus, named_devices, visible_devices

__all__ = ["Gpu", "gpus", "named_devices", "visible_devices"]
