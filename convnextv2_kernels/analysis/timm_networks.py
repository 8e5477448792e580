"""Networks of timm beside this library's: Figure 4 compares with a supervised ConvNeXt V1 and a ViT trained as an MAE.

``timm:NAME@FILE`` has the weights of a file, ``timm:NAME@random`` those drawn from a seed, and ``timm:NAME`` timm's own
if they are in the cache of this machine; nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._console import visible
from ..checkpoints.state import listing, shown, unwrap
from ..checkpoints.storage import read_checkpoint_file
from ..data import augment
from ..data.images import IMAGENET_MEAN, IMAGENET_STD
from ..errors import UserError
from .features import OtherNetwork, Tapped
from .networks import IMG_SIZE, Network, digest_of_file

PREFIX = "timm:"
RANDOM = "random"
_MLPS = ("mlp", "mlp_channels")  # children of a block that work on channels


class TimmNetwork(OtherNetwork):
    """A network of timm in evaluation mode, read inside the MLP of each of its blocks.

    ``act``: after the activation of the MLP, its widest layer, which the paper's Figure 4 reads; ``grn``: after GRN
    where the MLP has one, else the same; ``block``: output of the block. Of tokens those that are no patches (class and
    register tokens) are left out. The features of all blocks exist at once.

    Args:
        model: of timm, with blocks whose child ``mlp`` has ``fc1``, ``act`` and ``fc2``.
        name: for messages.

    Raises:
        ValueError: it has no such block.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.title = model, name
        config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        means, deviations = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
        pairs = zip(IMAGENET_MEAN, IMAGENET_STD, means, deviations, strict=True)
        rescaled = torch.tensor([[std / own_std, (mean - own) / own_std] for mean, std, own, own_std in pairs])
        self.register_buffer("_scale", rescaled[:, 0].view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_shift", rescaled[:, 1].view(1, 3, 1, 1), persistent=False)
        self.img_size: tuple[int, int] = tuple(config.get("input_size", (3, *IMG_SIZE))[1:])
        self._blocks = [
            (path.rpartition(".")[0], path)
            for path, module in model.named_modules()
            if path.rpartition(".")[2] in _MLPS and all(hasattr(module, part) for part in ("fc1", "act", "fc2"))
        ]
        if not self._blocks:
            raise ValueError(f"{name} has no blocks with an MLP, whose layers could be compared")

    def block_names(self) -> list[str]:
        return [name for name, _ in self._blocks]

    @torch.no_grad()
    def tapped(self, images: Tensor, taps: Sequence[str]) -> Iterator[Tapped]:
        found: dict[tuple[str, str], Tensor] = {}
        hooks = []
        for name, path in self._blocks:
            block, mlp = self.model.get_submodule(name), self.model.get_submodule(path)
            norm = getattr(mlp, "grn", None)
            modules = {"act": mlp.act, "grn": norm if isinstance(norm, nn.Module) else mlp.act, "block": block}
            hooks += [modules[tap].register_forward_hook(_keep(found, (name, tap))) for tap in taps]
        try:
            self.model(images * self._scale + self._shift)
        except (AssertionError, RuntimeError) as error:
            size = "x".join(map(str, images.shape[2:]))
            raise ValueError(f"{self.title} cannot take images of {size} pixels: {shown(str(error))}") from error
        finally:
            for hook in hooks:
                hook.remove()
        for index, (name, path) in enumerate(self._blocks):
            for tap in ("act", "grn", "block"):
                if (name, tap) in found:
                    yield Tapped(name, _stage(name), index, tap, self._map(found.pop((name, tap)), name, path, tap))

    def _map(self, x: Tensor, name: str, path: str, tap: str) -> Tensor:
        """Tokens or a map with channels in either place -> ``[N, H, W, channels]``."""
        if x.dim() == 3:
            x = x[:, getattr(self.model, "num_prefix_tokens", 0) :]
            grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
            height, width = grid if grid and grid[0] * grid[1] == x.shape[1] else (x.shape[1], 1)
            return x.reshape(x.shape[0], height, width, x.shape[2])
        block, mlp = self.model.get_submodule(name), self.model.get_submodule(path)
        first = isinstance(mlp.fc1, nn.Conv2d)
        if tap == "block":
            first = hasattr(block, "conv_dw") or x.shape[-1] != mlp.fc2.weight.shape[0]
        return x.permute(0, 2, 3, 1) if first else x


def _keep(found: dict[tuple[str, str], Tensor], key: tuple[str, str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[key] = output.detach()

    return hook


def _stage(name: str) -> int:
    """Of a block called "stages.2.blocks.1" 2; 0 where blocks have no stages."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first in ("stages", "layers") and number.isdecimal() else 0


def is_timm(path: Path) -> bool:
    """Whether a CHECKPOINT of a command line is a network of timm."""
    return str(path).startswith(PREFIX)


def label_of(path: Path) -> str:
    """What a network of timm is called in a plot."""
    return visible(str(path).removeprefix(PREFIX).partition("@")[0])


def load_timm_network(text: str, label: str, seed: int = 0, device: str | torch.device = "cpu") -> Network:
    """The network that ``timm:NAME``, ``timm:NAME@FILE`` or ``timm:NAME@random`` describes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: timm has no network of this name; a damaged file, or of another network; weights that are not on
            this machine; a network without MLPs.
        UserError: timm is not installed.
    """
    name, at, source = text.removeprefix(PREFIX).partition("@")
    what = PREFIX + visible(name)
    timm = _timm(what)
    if not timm.is_model(name):
        raise ValueError(f"{what} is no network of timm")
    if at and not source:
        raise ValueError(f"{what}@ must be followed by a file of weights or by {RANDOM}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=0)
    if source == RANDOM:
        about: dict[str, Any] = {"checkpoint": None, "model": what, "seed": seed}
    else:
        file = read_checkpoint_file(Path(source) if at else _cached(timm, name, what))
        _load(model, unwrap(file.content, False, visible(str(file.path))), visible(str(file.path)), what)
        about = {"checkpoint": file.path.name, "sha256": digest_of_file(file.path), "model": what}
    network = TimmNetwork(model, what)
    return Network(label, network.eval().to(device), about, network.img_size)


def _timm(what: str) -> ModuleType:
    try:
        return augment.timm()
    except UserError as error:
        raise UserError(f"{what} needs timm, which cannot be imported: pip install timm.") from error


def _load(model: nn.Module, weights: Mapping[str, Any], file: str, what: str) -> None:
    """Load a state_dict that may have the names of the network's original code, which timm's modules can translate;
    what it holds beside the network, such as a head, is left out."""
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    try:
        missing = model.load_state_dict(translate(dict(weights), model), strict=False).missing_keys
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not fit {what}: {shown(str(error))}") from error
    if missing:
        raise ValueError(f"{file} does not fit {what}: it lacks {listing(missing)}")


def _cached(timm: ModuleType, name: str, what: str) -> Path:
    """timm's own weights in the cache of Hugging Face's hub."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    repository = getattr(config, "hf_hub_id", None)
    for file in ("model.safetensors", "pytorch_model.bin") if repository else ():
        if isinstance(found := try_to_load_from_cache(repository, file), str):
            return Path(found)
    raise ValueError(
        f"the weights of {what} are not on this machine, and nothing is downloaded: give a file, {what}@FILE, or "
        f"{what}@{RANDOM}"
    )
