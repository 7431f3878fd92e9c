"""Finds out what a checkpoint file would import, without importing anything.

fairseq2 opens the states of the optimizer, the trainer and the data reader with
``torch.load(weights_only=False)``, which runs whatever such a file names. The state of
a model it opens with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Final, final

import torch
from typing_extensions import override

_ALLOWED: Final = frozenset(
    {
        "collections.OrderedDict",
        "collections.defaultdict",
        "builtins.set",
        # So protocol 2 calls it.
        "__builtin__.set",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        # The state of an optimizer under FSDP2.
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_wrapper_subclass",
        "torch.serialization._get_layout",
        "torch.distributed.device_mesh.DeviceMesh",
        "torch.distributed.tensor.DTensor",
        "torch.distributed.tensor._dtensor_spec.DTensorSpec",
        "torch.distributed.tensor._dtensor_spec.TensorMeta",
        "torch.distributed.tensor.placement_types.Partial",
        "torch.distributed.tensor.placement_types.Replicate",
        "torch.distributed.tensor.placement_types.Shard",
        "torch.distributed.tensor.placement_types._StridedShard",
    }
)
"""Whole names: one that only begins so might end in ``os.system``."""

_DATA_RECORD: Final = "data.pkl"

_CODE_RECORD: Final = "constants.pkl"
"""What only the archives of TorchScript have, which are programs."""


class UnsafeCheckpointError(ValueError):
    """A file of a checkpoint would run code if it was opened."""


def check_safe_to_unpickle(file: Path) -> None:
    """Make sure that opening a file of ``torch.save`` creates tensors and values only.

    Nothing in the file is run, and nothing imported: what it names is noted and
    replaced by a class that does nothing.

    :param file: The file.

    :raises UnsafeCheckpointError: It names something else, or is no such file.
    """
    names = _list_names(file)

    if unsafe := sorted(name for name in names if not _is_allowed(name)):
        raise UnsafeCheckpointError(
            f"'{file}' must hold tensors and plain values only, but would run "
            f"`{unsafe[0]}` when it is opened. Do not use this checkpoint, unless you "
            "know who made it. The parameters alone can be read without running "
            "anything: name the directory as `--from` or `checkpoint`."
        )


def _list_names(file: Path) -> set[str]:
    try:
        # The reader of `torch.load`: another one might see other content.
        reader = torch._C.PyTorchFileReader(str(file))

        if _CODE_RECORD in reader.get_all_records():
            return {"TorchScript"}

        unpickler = _NotingUnpickler(reader.get_record(_DATA_RECORD))
        unpickler.load()
    # Made to mislead, a pickle can raise anything while it is read.
    except Exception as ex:  # noqa: BLE001
        raise UnsafeCheckpointError(
            f"'{file}' must be a file of `torch.save`, but cannot be examined ({ex}). "
            "It is damaged, or made to run something."
        ) from None

    return unpickler.names


def _is_allowed(name: str) -> bool:
    if name in _ALLOWED:
        return True

    module, _, attribute = name.rpartition(".")

    return module == "torch" and (
        attribute.endswith("Storage")
        or isinstance(getattr(torch, attribute, None), torch.dtype)
    )


@final
class _NotingUnpickler(pickle.Unpickler):
    """Notes what a pickle imports, and makes nothing of it.

    :param content: The pickle.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

        self.names: set[str] = set()

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        self.names.add(f"{module_name}.{global_name}")

        return _Nothing

    @override
    def persistent_load(self, pid: Any) -> Any:
        return _Nothing()


class _Nothing:
    """Takes the place of any class or function, and of what it makes."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Nothing:
        """Make one, whatever the arguments."""
        return object.__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Take no state.

        :param state: What a pickle gives an object.
        """

    def __setitem__(self, key: object, value: object) -> None:
        """Take no item.

        :param key: The key.
        :param value: The value.
        """

    def append(self, value: object) -> None:
        """Take no element.

        :param value: The element.
        """

    def add(self, value: object) -> None:
        """Take no element.

        :param value: The element.
        """
