"""Suite `decode`: a published model, prefilled and decoded, against what people run it with.

| peer | what |
|---|---|
| transformers | `generate` of Hugging Face transformers, PyTorch on the CPU, the same weights |
| llama_cpp | llama.cpp through `llama-cpp-python`: the same weights, as float32 GGUF |

Needs `--pretrained`, a .gguf file or a Hugging Face directory. All decode greedily in float32, and
go on behind the end of a text, so that every contestant takes the same number of steps. Ours is
`sampling.generate`, the function that rollouts call, as a CPU wants it (`rollout.cpu_decode`).
Measured are prefill, decoding at several batch sizes (a generation without the prefill of the same
prompts, of the same round), whole generations, and what the grammar of the actions adds to a step.

What a step at batch 1 must read, all weights once, is set against the bandwidth that this machine
reaches when it reads as much memory and does nothing else.
"""

import atexit
import dataclasses
import functools
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.language import chat, protocol
from atommem_jax.language.grammar import compile_grammar
from atommem_jax.model import sampling
from atommem_jax.model.sampling import Agent, DecodeState, SamplerConfig
from atommem_jax.model.transformer import Transformer, count_params
from atommem_jax.types import Phase
from atommem_jax.weights import gguf, gguf_file, hf_tokenizer, huggingface
from experiments.benchmarks import timing

PREFILL = (8, 512)  # rows, tokens
PROMPT, STEPS = 128, 64
BATCHES = (1, 8, 32)
GRAMMAR_BATCH = 8
SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that all contestants run.

    Attributes:
      path: where its weights are.
      agent: ours, with the paper's actions and free text between them.
      params: float32, on one device.
    """

    path: pathlib.Path
    agent: Agent
    params: Any

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decoded token must read, whatever the batch."""
        return 4 * count_params(self.params)


def load(path: str, pad_token: str | None = None) -> Subject:
    """Reads weights and tokenizer. Raises PublishedError for what cannot be read."""
    config, params = huggingface.load(path)
    if gguf_file.is_gguf(path):
        tokenizer = gguf.open_model(path).read_tokenizer(config.vocab_size, pad_token=pad_token)
    else:
        tokenizer = hf_tokenizer.read_tokenizer(path, config.vocab_size, pad_token=pad_token)
    actions = protocol.atommem(SHOWN, free_text=True)
    grammar = compile_grammar(actions, tokenizer, max_actions=8, max_text=64)
    agent = Agent(
        # No token ends a row: every contestant takes as many steps.
        grammar=dataclasses.replace(grammar, eos_id=-1),
        template=chat.template(tokenizer, actions),
        model=Transformer(dataclasses.replace(config, pad_id=tokenizer.pad_id)),
        sampler=SamplerConfig(STEPS, constrained=False, cpu_decode=True),
    )
    return Subject(pathlib.Path(path), agent, params)


def make_prompts(rows: int, length: int, vocab_size: int) -> np.ndarray:
    """int32 [rows, length] of any tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length)).astype(np.int32)


# ---------------------------------------------------------------------------------------------
# Contestants


class Ours:
    """Prefill and decode as rollouts do them."""

    def __init__(self, subject: Subject):
        self._subject = subject

    def prefill(self, prompts: np.ndarray) -> timing.Contestant:
        tokens, params = jnp.asarray(prompts), self._subject.params
        run = functools.partial(_prefill, self._subject.agent, params, tokens)
        return timing.Contestant(lambda _: jax.block_until_ready(run()))

    def generate(self, prompts: np.ndarray, *, constrained: bool = False) -> timing.Contestant:
        agent = self._subject.agent
        sampler = dataclasses.replace(agent.sampler, constrained=constrained)
        agent = agent.replace(sampler=sampler)
        tokens, params = jnp.asarray(prompts), self._subject.params
        run = functools.partial(_generate, agent, params, tokens)
        return timing.Contestant(lambda _: np.asarray(run()))


@jax.jit
def _prefill(agent: Agent, params, tokens) -> DecodeState:
    """The first token, and where decoding goes on."""
    decoder = sampling.make_decoder(agent, params, jnp.zeros((), jnp.float32))
    return sampling.prefill(decoder, *_ask(tokens))


@jax.jit
def _generate(agent: Agent, params, tokens) -> jax.Array:
    decoder = sampling.make_decoder(agent, params, jnp.zeros((), jnp.float32))
    return sampling.generate(decoder, *_ask(tokens)).tokens


def _ask(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Prompts without padding as `sampling.prefill` takes them: with lengths, phases and so on."""
    rows, length = tokens.shape
    return (
        tokens,
        jnp.full((rows,), length, jnp.int32),
        jnp.full((rows,), int(Phase.READING), jnp.int32),
        jax.random.split(jax.random.key(0), rows),
        jnp.zeros((rows,), bool),
    )


class Transformers:
    """Hugging Face `generate`; raises ImportError where it is not installed."""

    def __init__(self, subject: Subject):
        import torch
        import transformers

        self._torch = torch
        path = subject.path
        place, more = (
            (path.parent, {"gguf_file": path.name}) if gguf_file.is_gguf(path) else (path, {})
        )
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, **more
        )
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None

    def prefill(self, prompts: np.ndarray) -> timing.Contestant:
        ids = self._torch.tensor(prompts, dtype=self._torch.long)

        def run(_: Any) -> None:
            with self._torch.inference_mode():
                self._model(ids, use_cache=True, logits_to_keep=1)

        return timing.with_torch_threads(timing.Contestant(run), timing.count_cores())

    def generate(self, prompts: np.ndarray) -> timing.Contestant:
        ids = self._torch.tensor(prompts, dtype=self._torch.long)

        def run(_: Any) -> np.ndarray:
            with self._torch.inference_mode():
                out = self._model.generate(
                    ids,
                    attention_mask=self._torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=STEPS,
                    min_new_tokens=STEPS,
                    pad_token_id=0,
                )
            return out[:, ids.shape[1] :].numpy()

        return timing.with_torch_threads(timing.Contestant(run), timing.count_cores())


class LlamaCpp:
    """llama.cpp with one sequence.

    Raises ImportError where it is not installed, ValueError where the weights are no GGUF file.
    """

    def __init__(self, subject: Subject):
        import llama_cpp

        if not gguf_file.is_gguf(subject.path):
            raise ValueError(
                f"{subject.path}: llama.cpp reads .gguf files; pass one to --pretrained"
            )

        self._library = llama_cpp
        self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name) / "float32.gguf"
        _write_float32(subject.path, path)
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=PROMPT + STEPS,
            n_threads=timing.count_cores(),
            n_threads_batch=timing.count_cores(),
            type_k=llama_cpp.GGML_TYPE_F32,  # by default float16
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        atexit.register(self._model.close)  # which is too late once modules are taken apart

    def prefill(self, prompts: np.ndarray) -> timing.Contestant:
        (row,) = prompts.tolist()

        def run(_: Any) -> None:
            self._model.reset()
            self._model.eval(row)

        return timing.Contestant(run)

    def generate(self, prompts: np.ndarray) -> timing.Contestant:
        (row,) = prompts.tolist()

        def run(_: Any) -> np.ndarray:
            self._model.reset()
            self._model.eval(row)
            found = []
            for _step in range(STEPS):
                found.append(int(np.argmax(self._read_logits())))
                if len(found) < STEPS:
                    self._model.eval(found[-1:])
            return np.asarray([found])

        return timing.Contestant(run)

    def _read_logits(self) -> np.ndarray:
        """float32 [V] of the last token. `Llama.scores` holds them only if it holds all tokens'."""
        address = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(address, (self._model.n_vocab(),))


def _write_float32(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same GGUF file with its tensors as float32; raises ImportError without package gguf."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------
# Measuring


def run(subject: Subject, *, runs: int) -> timing.Result:
    """All comparisons, by name.

    Of each peer `prefill`, `decode_1`, `generate_1` and so on; `grammar` and `bandwidth` of ours.
    """
    peers, results = _make_peers(subject)
    ours, vocabulary = Ours(subject), subject.agent.model.config.vocab_size
    prompts = make_prompts(*PREFILL, vocabulary)
    contestants = {"ours": ours.prefill(prompts)}
    contestants |= {
        name: peer.prefill(prompts) for name, peer in peers.items() if _takes(name, len(prompts))
    }
    seconds = timing.measure(contestants, runs=runs, label="prefill")
    for name in contestants.keys() - {"ours"}:
        results[f"{name}.prefill"] = timing.compare(
            seconds["ours"], seconds[name], work=float(prompts.size), unit="tokens"
        )
    for batch in BATCHES:
        prompts = make_prompts(batch, PROMPT, vocabulary)
        taking = {name: peer for name, peer in peers.items() if _takes(name, batch)}
        contestants = {}
        for name, player in {"ours": ours, **taking}.items():
            contestants[f"{name}.prefill"] = player.prefill(prompts)
            contestants[f"{name}.generate"] = player.generate(prompts)
        seconds = timing.measure(contestants, runs=runs, label=f"decode, batch {batch}")
        for name in ("ours", *taking):
            seconds[f"{name}.decode"] = _subtract(
                seconds[f"{name}.generate"], seconds[f"{name}.prefill"]
            )
        for name in taking:
            for part in ("decode", "generate"):
                results[f"{name}.{part}_{batch}"] = timing.compare(
                    seconds[f"ours.{part}"],
                    seconds[f"{name}.{part}"],
                    work=float(batch * STEPS),
                    unit="tokens",
                )
        if batch == 1:
            results["bandwidth"] = _compare_bandwidth(subject, seconds["ours.decode"], runs)
        if batch == GRAMMAR_BATCH:
            prefill = statistics.median(seconds["ours.prefill"])
            results["grammar"] = _measure_grammar(ours, prompts, prefill, runs)
    return results


def _takes(name: str, batch: int) -> bool:
    """Whether a peer plays at this batch size: llama.cpp has one sequence."""
    return name != "llama_cpp" or batch == 1


def _subtract(whole: list[float], part: list[float]) -> list[float]:
    """Of each round; never 0 or less, however noisy."""
    return [max(a - b, 1e-9) for a, b in zip(whole, part, strict=True)]


def _make_peers(subject: Subject) -> tuple[dict[str, Any], timing.Result]:
    peers, absent = {}, {}
    for name, make in (("transformers", Transformers), ("llama_cpp", LlamaCpp)):
        try:
            peers[name] = make(subject)
        except ImportError as error:
            absent[name] = timing.failed(f"{error}; install it with: pip install -e '.[hf,llama]'")
        except ValueError as error:
            absent[name] = timing.failed(str(error))
    return peers, absent


def _measure_grammar(ours: Ours, prompts: np.ndarray, prefill: float, runs: int) -> timing.Result:
    """What masks add to decoding; in twice the rounds, of nothing else: it is little.

    prefill: seconds of it, which both generations begin with.
    """
    contestants = {
        "free": ours.generate(prompts),
        "masked": ours.generate(prompts, constrained=True),
    }
    seconds = timing.measure(contestants, runs=2 * runs, label="grammar")
    free, masked = (_subtract(seconds[name], [prefill] * 2 * runs) for name in contestants)
    shares = [with_mask / without - 1 for without, with_mask in zip(free, masked, strict=True)]
    return {"share": statistics.median(shares), "shares": shares}


def _compare_bandwidth(subject: Subject, decoding: list[float], runs: int) -> timing.Result:
    """The rate at which weights are read at batch 1, and that at which memory can be read."""
    words = jnp.ones((subject.weight_bytes // 4,), jnp.float32)
    read = jax.jit(jnp.sum)
    contestant = timing.Contestant(lambda _: jax.block_until_ready(read(words)))
    limit = statistics.median(timing.measure({"read": contestant}, runs=runs)["read"])
    step = statistics.median(decoding) / STEPS
    return {
        "unit": "GB a second",
        "ours": subject.weight_bytes / step / 1e9,
        "limit": subject.weight_bytes / limit / 1e9,
        "share": limit / step,
    }
