"""Checkpoints in NumPy's ``.npz`` files, as code in JAX commonly writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import numpy.typing as npt
import torch
from fairseq2.file_system import FileSystem
from fairseq2.gang import GangContext
from fairseq2.model_checkpoint import (
    CorruptModelCheckpointError,
    ModelCheckpointLoader,
    ModelCheckpointLoadOptions,
    reshard_tensor,
)
from fairseq2.runtime.dependency import DependencyContainer
from numpy.lib.npyio import NpzFile
from torch import Tensor
from typing_extensions import override


def register_npz_checkpoints(container: DependencyContainer) -> None:
    """Let fairseq2 load checkpoints whose name ends in ``.npz``.

    :param container: fairseq2's dependency container.
    """
    container.collection.register_type(ModelCheckpointLoader, NpzCheckpointLoader)


@final
class NpzCheckpointLoader(ModelCheckpointLoader):
    """Loads a checkpoint from one ``.npz`` file; nothing in it is ever unpickled.

    :param file_system: Where the file is.
    :param gang_context: Tells the process groups, if the caller does not.
    """

    def __init__(self, file_system: FileSystem, gang_context: GangContext) -> None:
        self._file_system = file_system
        self._gang_context = gang_context

    @override
    def lazy_load(
        self,
        path: Path,
        shard_dims: Mapping[str, int],
        options: ModelCheckpointLoadOptions | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        options = options or ModelCheckpointLoadOptions()

        # The members of a zip file cannot be memory-mapped.
        checkpoint: dict[str, object] = {**_read(path)}

        if options.state_dict_converter is not None:
            checkpoint = options.state_dict_converter(checkpoint)

        gangs = options.gangs or self._gang_context.get_current_gangs()

        for key, tensor in checkpoint.items():
            assert isinstance(tensor, Tensor)

            yield (
                key,
                reshard_tensor(
                    key,
                    [[tensor]],
                    source_shard_sizes=(1, 1),
                    target_shard_sizes=(gangs.tp.size, gangs.sdp.size),
                    target_shard_ranks=(gangs.tp.rank, gangs.sdp.rank),
                    shard_dims=shard_dims,
                ),
            )

    @override
    def supports_path(self, path: Path) -> bool:
        return path.suffix == ".npz" and self._file_system.is_file(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        file = np.load(path, allow_pickle=False)

        # The same function opens a file of a single array without a name.
        if not isinstance(file, NpzFile):
            raise ValueError("it holds a single array without a name.")

        with file:
            arrays = dict(file)
    except (BadZipFile, ZlibError, EOFError, ValueError) as ex:
        raise CorruptModelCheckpointError(
            path, f"'{path}' must be an .npz file of plain arrays, but is not: {ex}"
        ) from ex

    return {name: _to_tensor(array, name, path) for name, array in arrays.items()}


def _to_tensor(array: npt.NDArray[Any], name: str, path: Path) -> Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as ex:
        # JAX's bfloat16 becomes two bytes without a meaning.
        raise CorruptModelCheckpointError(
            path,
            f"'{name}' in '{path}' must have a data type that both NumPy and PyTorch "
            f"have, but has {array.dtype} instead. Save it as float32.",
        ) from ex
