"""The planner's decoder, rung by rung, beside a plain one in the reference's way: the same weights, in turns, in one run.

    python -m benchmarks.planner_decode [--quick] [--json FILE]

unrolled   reference/model.md §13.3 written straightforwardly: prefix of three cameras and 200 prompt slots, 20 steps unrolled into one graph that
           never stops early, cache grown by concatenation, full vocabulary head masked afterwards
full head  early stop: ends with the text, but computes the logits of the whole vocabulary
plain      sliced head: ends with the text, and has the head's rows of allowed tokens only: `planner.drafts` 0
rejected   the same with two drafts that are wrong from the first token on: `planner.drafts` 2
accepted   with the right one: no decode step
pictures   the same, of pictures that were not seen before; all of ours above know theirs, which the unrolled one always reads

Weights: the demo's planner, the golden pi0.5 checkpoint (both with real answers, some short) and random weights of larger sizes. Random weights do
not end their answers, so "5 tokens" there is our call limited to 5, the length of a typical subtask (reference/model.md §13.6). The share of the
memory limit is what reading each weight once per pass would take, at the speed of one large sum in this run, over what the call took. What is
compiled: for the unrolled one its program; for ours the pass, the loop and the tower, for short prompts (the unrolled one has one shape, too), and
for all that such requests can need, which also takes the pass of long prompts.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import planner  # noqa: F401  (sets what jax must find in the environment)

# isort: split
import jax
import jax.numpy as jnp

from benchmarks.report import Goal, arguments, finish, machine
from demo.render import render
from demo.sampling import for_planner
from demo.serving import CHECKPOINTS
from pi0.lora import ParamSource
from pi0.orbax import OrbaxParams
from pi0.param_tree import ATTENTION, BLOCK, IMAGE_SIZE, IMG, LAYERS, LLM, BackboneDims, ExpertDims, VisionDims, backbone_shapes
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT
from pi0.tokenizer import EOS_ID, PLANNER_MAX_TOKENS, TOKENIZER_FILE, PromptTokenizer, TokenizedPrompt
from planner.decoder import Decoder, text_slots
from planner.drafts import NODES_PER_DRAFT
from planner.generator import pack
from planner.observation import prepare_cameras
from planner.restore import restore_from

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
STEPS = 20
CAMERAS = 3
DRAFTS = 2
GUESSES = DRAFTS * NODES_PER_DRAFT
SLOTS = text_slots(GUESSES)
TYPICAL_TOKENS = 5

MEDIUM = BackboneDims(VisionDims(192, 3, 4, 48, 512, 14, 256), ExpertDims(512, 2048), 16_384, 4, 8, 1, 64)
LARGE = BackboneDims(VisionDims(384, 8, 6, 64, 1024, 14, 256), ExpertDims(1024, 4096), 65_536, 12, 8, 1, 128)
PI05 = BackboneDims(VisionDims(1152, 27, 16, 72, 4304, 14, 256), ExpertDims(2048, 16_384), 257_152, 18, 8, 1, 256)
"""The released models' dimensions."""

Leaves = dict[str, jax.Array]


class RandomParams:
    """Random weights of a model with these dimensions, scaled so that activations keep their size."""

    def __init__(self, dims: BackboneDims) -> None:
        self._shapes = backbone_shapes(dims)

    def __iter__(self) -> Any:
        return iter(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        shape = self._shapes[name]
        scale = np.float32(0.02 if name.endswith(("bias", "scale")) else shape[-2] ** -0.5 if len(shape) > 1 else 1.0)
        values: NDArray[Any] = np.empty(shape, dtype or np.float32)
        # Slice by slice: at full size all of the largest leaf in float32 would take 5 GB.
        for part in values if len(shape) > 2 else [values]:
            part[...] = rng.standard_normal(part.shape, np.float32) * scale
        return values


def plain_decode(
    leaves: Leaves, dims: BackboneDims, allowed: jax.Array, images: jax.Array, image_mask: jax.Array, ids: jax.Array, mask: jax.Array
) -> jax.Array:
    """``[STEPS]`` tokens for images ``[3, 224, 224, 3]``, of which ``[3]`` are there, and one prompt ``[200]``; zeros after the end of text."""
    embedding = leaves[f"{LLM}/embedder/input_embedding"]
    embed = lambda tokens: embedding[tokens] * jnp.sqrt(embedding.shape[-1]).astype(embedding.dtype)  # noqa: E731
    image_tokens = _plain_vision(leaves, dims.vision, images).reshape(1, -1, embedding.shape[-1])
    x = jnp.concatenate([image_tokens, embed(ids)[None]], axis=1)
    valid = jnp.concatenate([jnp.repeat(image_mask, dims.vision.tokens), mask])
    last = image_tokens.shape[1] + mask.sum() - 1
    hidden, cache = _plain_language(leaves, dims, x, (jnp.cumsum(valid) - 1)[None], (valid[:, None] & valid[None, :])[None], None)
    token = _plain_choice(leaves, hidden[0, last], allowed)
    tokens, done = [token], token == EOS_ID
    for step in range(STEPS):
        visible = jnp.concatenate([valid, jnp.ones(step + 1, bool)])[None, None]
        hidden, cache = _plain_language(leaves, dims, embed(token)[None, None], (valid.sum() + step)[None, None], visible, cache)
        token = jnp.where(done, 0, _plain_choice(leaves, hidden[0, 0], allowed))
        tokens.append(token)
        done = done | (token == EOS_ID)
    return jnp.stack(tokens[:STEPS])


def _plain_choice(leaves: Leaves, hidden: jax.Array, allowed: jax.Array) -> jax.Array:
    logits = (leaves[f"{LLM}/embedder/input_embedding"] @ hidden).astype(jnp.float32)
    return jnp.argmax(jnp.where(allowed, logits, -1e9)).astype(jnp.int32)


def _plain_vision(leaves: Leaves, dims: VisionDims, images: jax.Array) -> jax.Array:
    kernel = leaves[f"{IMG}/embedding/kernel"]
    x = jax.lax.conv_general_dilated(images, kernel, (dims.patch, dims.patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = (x + leaves[f"{IMG}/embedding/bias"]).reshape(images.shape[0], -1, dims.width) + leaves[f"{IMG}/pos_embedding"]

    def norm(x: jax.Array, name: str, at: Any) -> jax.Array:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * leaves[f"{name}/scale"][at] + leaves[f"{name}/bias"][at]

    def dense(spec: str, x: jax.Array, name: str, at: Any) -> jax.Array:
        return jnp.einsum(spec, x, leaves[f"{name}/kernel"][at]) + leaves[f"{name}/bias"][at]

    def layer(x: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        y = norm(x, f"{BLOCK}/LayerNorm_0", at)
        q, k, v = (dense("bsd,dnh->bsnh", y, f"{ATTENTION}/{part}", at) for part in ("query", "key", "value"))
        probabilities = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q / jnp.sqrt(dims.head_dim), k))
        x = x + dense("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", probabilities, v), f"{ATTENTION}/out", at)
        y = jax.nn.gelu(dense("bsd,df->bsf", norm(x, f"{BLOCK}/LayerNorm_1", at), f"{BLOCK}/MlpBlock_0/Dense_0", at))
        return x + dense("bsf,fd->bsd", y, f"{BLOCK}/MlpBlock_0/Dense_1", at), None

    x, _ = jax.lax.scan(layer, x, jnp.arange(dims.depth))
    return dense("bsd,dw->bsw", norm(x, f"{IMG}/Transformer/encoder_norm", ...), f"{IMG}/head", ...)


def _plain_language(
    leaves: Leaves, dims: BackboneDims, x: jax.Array, positions: jax.Array, visible: jax.Array, cache: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """As the reference: a scan over the layers (model.md §8), keys and values joined to those of the cache."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)

    def rotate(x: jax.Array) -> jax.Array:
        angle = positions[:, :, None, None] / 10_000 ** (jnp.arange(dims.head_dim // 2) * 2 / dims.head_dim)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)

    layers = {name.removeprefix(f"{LAYERS}/"): leaf for name, leaf in leaves.items() if name.startswith(f"{LAYERS}/")}

    def layer(x: jax.Array, inputs: tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array] | None]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        w, cached = inputs
        y = norm(x, w["pre_attention_norm/scale"])
        if "attn/qkv_einsum/w" in w:
            q, k, v = jnp.einsum("btd,cndh->cbtnh", y, w["attn/qkv_einsum/w"])
        else:
            q = jnp.einsum("btd,ndh->btnh", y, w["attn/q_einsum/w"])
            k, v = jnp.einsum("btd,ckdh->cbtkh", y, w["attn/kv_einsum/w"])
        q, k = rotate(q) * dims.head_dim**-0.5, rotate(k)
        if cached is not None:
            k, v = jnp.concatenate([cached[0], k], axis=1), jnp.concatenate([cached[1], v], axis=1)
        q = q.reshape(*q.shape[:2], dims.kv_heads, -1, dims.head_dim)
        logits = jnp.where(visible[:, None, None], jnp.einsum("btkgh,bskh->bkgts", q, k), -2.3819763e38)
        attended = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(logits), v).reshape(*x.shape[:2], dims.heads, dims.head_dim)
        x = x + jnp.einsum("btnh,nhd->btd", attended, w["attn/attn_vec_einsum/w"])
        y = norm(x, w["pre_ffw_norm/scale"])
        gate, up = w["mlp/gating_einsum"]
        return x + (jax.nn.gelu(y @ gate) * (y @ up)) @ w["mlp/linear"], (k, v)

    x, grown = jax.lax.scan(layer, x, (layers, cache))
    return norm(x, leaves[f"{LLM}/final_norm/scale"]), grown


@dataclass(frozen=True)
class Request:
    prompt: TokenizedPrompt
    images: list[NDArray[np.float32]]


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the timed rounds, in ms, and the seconds that compiling took."""

    weights: str
    answer: str
    tokens: int
    steps_run: int
    unrolled_ms: float
    full_head_ms: float
    plain_ms: float
    rejected_ms: float
    accepted_ms: float
    pictures_ms: float
    compile_s: float
    all_compile_s: float
    unrolled_compile_s: float
    same_tokens: bool
    of_memory_limit: float
    """of the call with the right draft"""


class Pair:
    """Both decoders on the same weights, compiled, with the seconds that took: medians of ``rounds`` in turns."""

    def __init__(self, name: str, source: ParamSource, allowed: NDArray[np.int32], rounds: int, cameras: int = CAMERAS) -> None:
        self.name = name
        params, self.dims = restore_from(source, allowed, np.dtype(np.float32), where=name)
        self.plain = Decoder(params, self.dims, cameras=cameras)
        everything = np.arange(self.dims.vocab_size, dtype=np.int32)
        self.full_head = Decoder(params.replace(head=params.language.embedding, head_ids=everything), self.dims, cameras=cameras)
        self.weights_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((params.vision, params.language.blocks, params.head)))
        self._leaves = {leaf: jnp.asarray(source.read(leaf, np.dtype(np.float32))) for leaf in backbone_shapes(self.dims)}
        self._allowed = jnp.zeros(self.dims.vocab_size, bool).at[jnp.asarray(allowed)].set(True)
        jax.block_until_ready((params, self._leaves))
        for decoder in (self.plain, self.full_head):
            decoder.compile([(1, cameras, SLOTS[0])])

        def drafting(slots: Sequence[int]) -> None:
            self.drafting = Decoder(params, self.dims, guesses=GUESSES, cameras=cameras)
            self.drafting.compile([(1, cameras, count) for count in slots])

        text = (PLANNER_MAX_TOKENS,)
        arguments = {
            "images": jax.ShapeDtypeStruct((CAMERAS, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32),
            "image_mask": jax.ShapeDtypeStruct((CAMERAS,), jnp.bool_),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "mask": jax.ShapeDtypeStruct(text, jnp.bool_),
        }

        def unrolled() -> None:
            with jax.default_matmul_precision("highest"):
                jitted = jax.jit(functools.partial(plain_decode, dims=self.dims))
                self._unrolled = jitted.lower(self._leaves, allowed=self._allowed, **arguments).compile()

        took = [[_timed(work)[0] for work in (lambda: drafting(SLOTS[:1]), lambda: drafting(SLOTS), unrolled)] for _ in range(rounds)]
        self.compile_s, self.all_compile_s, self.unrolled_compile_s = map(statistics.median, zip(*took, strict=True))

    def run(self, decoder: Decoder, request: Request, max_tokens: int, drafts: Sequence[Sequence[int]] = ()) -> tuple[list[int], int]:
        """(tokens, decode steps)."""
        decoded = decoder(pack([request.prompt], [request.images], SLOTS), max_tokens, [decoder.tree(drafts, max_tokens)])
        return decoded.tokens[0, : decoded.length[0]].tolist(), decoded.loop_steps

    def run_unrolled(self, request: Request) -> list[int]:
        ids, mask = request.prompt.padded(PLANNER_MAX_TOKENS)
        absent = CAMERAS - len(request.images)
        images = np.stack([*request.images, *[np.zeros_like(request.images[0])] * absent])
        image_mask = np.arange(CAMERAS) < len(request.images)
        said = self._unrolled(self._leaves, allowed=self._allowed, images=images, image_mask=image_mask, ids=ids, mask=mask)
        tokens: list[int] = jax.device_get(said).tolist()
        return tokens[: tokens.index(EOS_ID) + 1] if EOS_ID in tokens else tokens


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def _with_another_pixel(image: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    image = image.copy()
    image[0, 0, 0] = number / 100
    return image


def measure(pair: Pair, request: Request, answer: str, rounds: int, bytes_per_s: float, max_tokens: int = STEPS) -> Row:
    """Times all of them turn by turn on one request."""
    tokens, steps = pair.run(pair.plain, request, max_tokens)
    # The full head may say what is not allowed, and for longer: it gets as many steps as the answer takes.
    limit = len(tokens)
    wrong = [[token + offset for token in tokens[:NODES_PER_DRAFT]] for offset in (1, 2)]
    right = [tokens[:-1] if tokens[-1] == EOS_ID else tokens]
    unseen = iter([replace(request, images=[_with_another_pixel(image, number) for image in request.images]) for number in range(rounds + 1)])
    ways: dict[str, Callable[[], tuple[list[int], int]]] = {
        "unrolled": lambda: (pair.run_unrolled(request), STEPS),
        "full_head": lambda: pair.run(pair.full_head, request, limit),
        "plain": lambda: pair.run(pair.plain, request, max_tokens),
        "rejected": lambda: pair.run(pair.drafting, request, max_tokens, wrong),
        "accepted": lambda: pair.run(pair.drafting, request, max_tokens, right),
        "pictures": lambda: pair.run(pair.drafting, next(unseen), max_tokens, right),
    }
    said = {name: way() for name, way in ways.items()}
    took: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(rounds):
        # What runs behind the unrolled one finds the caches cold; that must not be the same one each time.
        for name, way in order.sample(list(ways.items()), len(ways)):
            took[name].append(_timed(way)[0] * 1000)
    ms = {name: statistics.median(times) for name, times in took.items()}
    return Row(
        weights=pair.name,
        answer=answer,
        tokens=len(tokens),
        steps_run=steps,
        **{f"{name}_ms": ms[name] for name in ways},
        compile_s=pair.compile_s,
        all_compile_s=pair.all_compile_s,
        unrolled_compile_s=pair.unrolled_compile_s,
        same_tokens=all(said[name][0][: len(tokens)] == tokens for name in ("unrolled", "rejected", "accepted")),
        of_memory_limit=pair.weights_bytes * (1 + said["accepted"][1]) / bytes_per_s * 1000 / ms["accepted"],
    )


def memory_bytes_per_s() -> float:
    """How fast this machine reads: the best of several sums over 256 MB, by jax as the decoder runs."""
    data = jnp.ones(1 << 26, jnp.float32)
    total = jax.jit(jnp.sum).lower(data).compile()
    return data.nbytes / min(_timed(lambda: total(data).block_until_ready())[0] for _ in range(8))


def weights_read(dims: BackboneDims, passes: int) -> int:
    """How many weights an answer reads: the tower's once, the language model's and the whole head's in each pass."""
    sizes = {name: math.prod(shape) for name, shape in backbone_shapes(dims).items()}
    tower = sum(size for name, size in sizes.items() if name.startswith(IMG))
    return tower + passes * (sum(sizes.values()) - tower)


def compile_rounds(quick: bool) -> int:
    return 1 if quick else 3


def demo_rows(rounds: int, bytes_per_s: float, quick: bool) -> list[Row]:
    """Tables of the demo, whose planner was trained: real answers of 3 to 7 tokens. It has one camera; the reference computes three."""
    checkpoint = CHECKPOINTS / "planner"
    pieces = PromptTokenizer(checkpoint / TOKENIZER_FILE)
    pair = Pair("demo", OrbaxParams(checkpoint), pieces.allowed_tokens("printable_ascii"), compile_rounds(quick), cameras=1)
    count = 4 if quick else 12
    tables = for_planner(np.random.default_rng(0), count)
    rows = []
    for number, (task, picture) in enumerate(zip(tables.instructions, render(tables.scenes, IMAGE_SIZE), strict=True)):
        request = Request(pieces.planner_prompt(task, DEFAULT_GENERATION_PROMPT_FORMAT), prepare_cameras({"base_0_rgb": picture}, "mask"))
        rows.append(measure(pair, request, f"table {number}", rounds, bytes_per_s))
    return rows


def golden_rows(rounds: int, bytes_per_s: float, quick: bool) -> list[Row]:
    pieces = PromptTokenizer(GOLDEN / "tokenizer" / "paligemma_tokenizer.model")
    pair = Pair("golden", OrbaxParams(GOLDEN / "checkpoints" / "pi05_orbax"), pieces.allowed_tokens("printable_ascii"), compile_rounds(quick))
    cases = {case["name"]: case for case in json.loads((GOLDEN / "planner" / "cases.json").read_text())["cases"]}
    rows = []
    for name in ("case_06", "case_03", "case_15", "case_04") if quick else sorted(cases):
        case = cases[name]
        with np.load(GOLDEN / "planner" / f"{name}.npz") as arrays:
            images = {key.removeprefix("images/"): arrays[key] for key in arrays.files if key.startswith("images/")}
        prompt = pieces.planner_prompt(case["prompt"], case["prompt_format"], on_long_prompt="truncate")
        rows.append(measure(pair, Request(prompt, prepare_cameras(images, "grey")), name, rounds, bytes_per_s))
    return rows


def random_rows(name: str, dims: BackboneDims, rounds: int, bytes_per_s: float, quick: bool) -> list[Row]:
    # No end of text among the allowed tokens, so that both decoders run to their limits.
    pair = Pair(name, RandomParams(dims), np.arange(EOS_ID + 1, dims.vocab_size * 3 // 4, dtype=np.int32), compile_rounds(quick))
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32) for _ in range(3)]
    ids = rng.integers(3, dims.vocab_size, 24).astype(np.int32)
    request = Request(TokenizedPrompt(ids, len(ids), False), images)
    lengths = (TYPICAL_TOKENS,) if quick else (TYPICAL_TOKENS, STEPS)
    return [measure(pair, request, f"{length} tokens", rounds, bytes_per_s, length) for length in lengths]


def saved_time(weights: str, rows: list[Row]) -> list[Goal]:
    """The goals of the smallest size, medians over answers of more than one token. The demo's pair has least to do in a call; the golden model, which
    reads eight times as many tokens, has the fewest weights."""
    own = [row for row in rows if row.weights == weights and row.tokens > 1]
    unrolled, early, plain = (
        statistics.median(getattr(row, f"{way}_ms") / row.accepted_ms for row in own) for way in ("unrolled", "full_head", "plain")
    )
    rejected = statistics.median(row.rejected_ms / row.plain_ms for row in own)
    return [
        Goal(f"unrolled ms / accepted ms, {weights}, median", unrolled, ">= 5", unrolled >= 5),
        Goal(f"full head ms / accepted ms, {weights}, median", early, ">= 1.5", early >= 1.5),
        Goal(f"plain ms / accepted ms, {weights}, median", plain, ">= 1.5", plain >= 1.5),
        Goal(f"rejected ms / plain ms, {weights}, median", rejected, "<= 1.05", rejected <= 1.05),
    ]


def goals(rows: list[Row]) -> list[Goal]:
    typical = [row for row in rows if row.tokens <= TYPICAL_TOKENS + 1]
    extra = max(row.steps_run - row.tokens for row in rows)
    same = sum(row.same_tokens for row in rows) / len(rows)
    rejected = statistics.median(row.rejected_ms / row.plain_ms for row in rows)
    short = max(row.plain_ms / row.unrolled_ms for row in typical)
    saved = weights_read(PI05, 1) / weights_read(PI05, 1 + STEPS)
    compiling = max(row.compile_s / row.unrolled_compile_s for row in rows)
    compiling_all = max(row.all_compile_s / row.unrolled_compile_s for row in rows)
    return [
        Goal("decode steps run minus tokens, worst", extra, "<= 1", extra <= 1),
        Goal("same tokens in all ways, share of requests", same, "= 1", same == 1),
        Goal("weights read at pi0.5's size, unchanged subtask / unrolled", saved, "<= 0.1", saved <= 0.1),
        *saved_time("demo", rows),
        *saved_time("golden", rows),
        Goal("rejected ms / plain ms, median of all", rejected, "<= 1.05", rejected <= 1.05),
        Goal(f"plain ms / unrolled ms, answers of <= {TYPICAL_TOKENS + 1} tokens, worst", short, "<= 0.9", short <= 0.9),
        Goal("compile s, one shape / unrolled, worst", compiling, "<= 0.333", compiling <= 1 / 3),
        Goal("compile s, short and long prompts / unrolled, worst", compiling_all, "<= 0.333", compiling_all <= 1 / 3),
    ]


def main() -> None:
    options = arguments(__doc__)
    rounds = 3 if options.quick else 9
    bytes_per_s = memory_bytes_per_s()
    rows = demo_rows(rounds, bytes_per_s, options.quick) + golden_rows(rounds, bytes_per_s, options.quick)
    rows += random_rows("random 512 × 4", MEDIUM, rounds, bytes_per_s, options.quick)
    if not options.quick:
        rows += random_rows("random 1024 × 12", LARGE, rounds, bytes_per_s, options.quick)
    print(f"{machine()}; jax {jax.__version__} on {jax.devices()[0].device_kind}, float32; memory {bytes_per_s / 1e9:.1f} GB/s")
    ways = ("unrolled", "full head", "plain", "rejected", "accepted", "pictures")
    head = f"{'weights':<18}{'answer':<11}{'tokens':>7}{'steps':>6}{''.join(f'{way:>11}' for way in ways)}  ms"
    print(f"{head}{'of limit':>10}{'compile s':>11}{'all':>6}{'unrolled':>9}{'same':>6}")
    for row in rows:
        times = "".join(f"{getattr(row, way.replace(' ', '_') + '_ms'):>11.1f}" for way in ways)
        print(
            f"{row.weights:<18}{row.answer:<11}{row.tokens:>7}{row.steps_run:>6}{times}    {row.of_memory_limit:>10.0%}"
            f"{row.compile_s:>11.2f}{row.all_compile_s:>6.2f}{row.unrolled_compile_s:>9.2f}{'yes' if row.same_tokens else 'NO':>6}"
        )
    finish(goals(rows), {"memory_bytes_per_s": bytes_per_s, "rows": [asdict(row) for row in rows]}, options.json)


if __name__ == "__main__":
    main()
