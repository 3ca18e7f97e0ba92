"""Suite `decode`: a published model, prefilled and decoded, against what people run it with.

| peer | what |
|---|---|
| transformers | `generate` of Hugging Face transformers, PyTorch on the CPU, the same weights |
| llama_cpp | llama.cpp through the wheels of `xllamacpp`: the same weights, as float32 GGUF |

Needs `--pretrained`, a .gguf file or a Hugging Face directory. All decode greedily in float32, and
go on behind the end of a text, so that every contestant takes the same number of steps. Ours is
`sampling.generate`, the function that rollouts call, as a CPU wants it (`rollout.cpu_decode`).
Measured are prefill, decoding at several batch sizes (a generation without the prefill of the same
prompts, of the same round), whole generations, and what the grammar of the actions adds to a step.

With a HotpotQA file there are also *turns*: prompts of an agent that reads its documents, one after
the other, each gone on with greedily. There ours guesses tokens and checks them together
(`rollout.draft`): what is written is the same, and so is the work that a peer does for it.

What a step at batch 1 must read, all weights once, is set against the bandwidth that this machine
reaches when it reads as much memory and does nothing else.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atommem_jax.language import chat, protocol
from atommem_jax.language.grammar import compile_grammar
from atommem_jax.language.tokenizer import Tokenizer
from atommem_jax.model import sampling
from atommem_jax.model.sampling import Agent, DecodeState, SamplerConfig
from atommem_jax.model.transformer import Transformer, count_params
from atommem_jax.tasks import multihop_files, multihop_qa
from atommem_jax.types import Phase
from atommem_jax.weights import gguf, gguf_file, hf_tokenizer, huggingface
from experiments.benchmarks import timing

PREFILL = (8, 512)  # rows, tokens
PROMPT, STEPS = 128, 64
BATCHES = (1, 8, 32)
GRAMMAR_BATCH = 8
SHOWN = 6
TURNS, TURN_PROMPT, DRAFT = 6, 448, 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that all contestants run.

    Attributes:
      path: where its weights are.
      agent: ours, with the paper's actions and free text between them.
      params: float32, on one device.
      tokenizer: of the model.
    """

    path: pathlib.Path
    agent: Agent
    params: Any
    tokenizer: Tokenizer

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
        # The order of matrices that a CPU wants is no use to others.
        sampler=SamplerConfig(STEPS, constrained=False, cpu_decode=jax.default_backend() == "cpu"),
    )
    return Subject(pathlib.Path(path), agent, params, tokenizer)


def make_prompts(rows: int, length: int, vocab_size: int) -> np.ndarray:
    """int32 [rows, length] of any tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length)).astype(np.int32)


def make_turns(subject: Subject, data_file: str) -> np.ndarray:
    """int32 [TURNS, TURN_PROMPT]: a reading turn about each of the first samples of HotpotQA.

    Documents are cut where the prompt is full. Raises ConfigError for what is no such file.
    """
    config = multihop_qa.MultihopQaConfig(dataset="hotpotqa", data_file=data_file)
    samples = multihop_qa.generate(config, multihop_files.read(config), "train")
    template, encode = subject.agent.template, subject.tokenizer.encode
    rows = []
    for sample in itertools.islice(samples, TURNS):
        text = " ".join(fact["text"] for chunk in sample["chunks"] for fact in chunk)
        question = encode(sample["questions"][0]["text"])
        begin = [*_ids(template.prefix), *_ids(template.question), *question]
        begin += _ids(template.chunk)
        end = _ids(template.suffix[int(Phase.READING)])
        rows.append([*begin, *encode(text)[: TURN_PROMPT - len(begin) - len(end)], *end])
    return np.asarray(rows, np.int32)


def _ids(header: jax.Array) -> list[int]:
    return [int(i) for i in header if i >= 0]


# ---------------------------------------------------------------------------------------------
# Contestants


class OneByOne:
    """A contestant that answers a batch row by row, as one sequence at a time is served."""

    def __init__(self, player: Any):
        self._player = player

    def prefill(self, prompts: np.ndarray) -> timing.Contestant:
        return self._each("prefill", prompts)

    def generate(self, prompts: np.ndarray) -> timing.Contestant:
        return self._each("generate", prompts)

    def _each(self, what: str, prompts: np.ndarray) -> timing.Contestant:
        parts = [getattr(self._player, what)(row[None]) for row in prompts]

        def run(_: Any) -> list[Any]:
            return [part.run(None) for part in parts]

        return timing.Contestant(run)


class Ours:
    """Prefill and decode as rollouts do them."""

    def __init__(self, subject: Subject, draft: int = 0):
        sampler = dataclasses.replace(subject.agent.sampler, draft=draft)
        agent = subject.agent.replace(sampler=sampler)
        self._subject = dataclasses.replace(subject, agent=agent)

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
        # On the device of ours: a card is compared with itself.
        self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._model = model.eval().to(self._device)
        self._model.generation_config.eos_token_id = None

    def prefill(self, prompts: np.ndarray) -> timing.Contestant:
        ids = self._torch.tensor(prompts, dtype=self._torch.long, device=self._device)

        def run(_: Any) -> None:
            with self._torch.inference_mode():
                out = self._model(ids, use_cache=True, logits_to_keep=1)
                out.logits[0, 0, 0].item()  # waits for the device

        return timing.with_torch_threads(timing.Contestant(run), timing.count_cores())

    def generate(self, prompts: np.ndarray) -> timing.Contestant:
        ids = self._torch.tensor(prompts, dtype=self._torch.long, device=self._device)

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
            return out[:, ids.shape[1] :].cpu().numpy()

        return timing.with_torch_threads(timing.Contestant(run), timing.count_cores())


class LlamaCpp:
    """llama.cpp with one sequence: its server within this process, without HTTP.

    Raises ImportError where it is not installed, ValueError where the weights are no GGUF file.
    """

    def __init__(self, subject: Subject):
        import xllamacpp

        if not gguf_file.is_gguf(subject.path):
            raise ValueError(
                f"{subject.path}: llama.cpp reads .gguf files; pass one to --pretrained"
            )
        self._folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self._folder.name) / "float32.gguf"
        _write_float32(subject.path, path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = max(PROMPT, TURN_PROMPT) + STEPS
        params.n_parallel = 1
        params.cpuparams.n_threads = timing.count_cores()
        params.cpuparams_batch.n_threads = timing.count_cores()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def prefill(self, prompts: np.ndarray) -> timing.Contestant:
        # It always writes a token, which takes the logits that a prefill ends with.
        return timing.Contestant(lambda _: self._complete(prompts, 1))

    def generate(self, prompts: np.ndarray) -> timing.Contestant:
        return timing.Contestant(lambda _: self._complete(prompts, STEPS))

    def write(self, prompts: np.ndarray) -> list[int]:
        """The tokens that `generate` goes on with; asking for them takes longer."""
        (choice,) = self._complete(prompts, STEPS, logprobs=1)["choices"]
        return [token["id"] for token in choice["logprobs"]["content"]]

    def _complete(self, prompts: np.ndarray, steps: int, **more: Any) -> dict[str, Any]:
        (row,) = prompts.tolist()
        found = self._server.handle_completions(
            {
                **{"prompt": row, "n_predict": steps, "ignore_eos": True, "cache_prompt": False},
                **{"temperature": 0.0, "top_k": 1, "samplers": ["top_k"], **more},
            }
        )
        told = json.loads(found) if isinstance(found, str) else found
        if "choices" not in told:
            raise RuntimeError(f"llama.cpp did not answer: {told}")
        return told


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


def run(
    subject: Subject,
    *,
    runs: int,
    data_file: str | None = None,
    batches: Sequence[int] | None = None,
) -> timing.Result:
    """All comparisons, by name.

    Of each peer `prefill`, `decode_1`, `generate_1` and so on; `grammar` and `bandwidth` of ours.
    data_file: of HotpotQA; of each peer then also `decode_turns` and `generate_turns`.
    batches: rows decoded at a time; None for `BATCHES`.
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
    for batch in batches or BATCHES:
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
    if data_file:
        results |= _measure_turns(subject, peers, make_turns(subject, data_file), runs)
    return results


def _measure_turns(subject: Subject, peers: Any, prompts: np.ndarray, runs: int) -> timing.Result:
    """Turns of an agent at batch 1: ours with guesses, and without any."""
    players = {"ours": Ours(subject, DRAFT), "ours_without_draft": Ours(subject), **peers}
    contestants = {}
    for name, player in players.items():
        contestants[f"{name}.prefill"] = OneByOne(player).prefill(prompts)
        contestants[f"{name}.generate"] = OneByOne(player).generate(prompts)
    seconds = timing.measure(contestants, runs=runs, label="turns")
    results: timing.Result = {}
    for name in players:
        whole, part = seconds[f"{name}.generate"], seconds[f"{name}.prefill"]
        seconds[f"{name}.decode"] = _subtract(whole, part)
    for name in players.keys() - {"ours"}:
        for part in ("decode", "generate"):
            results[f"{name}.{part}_turns"] = timing.compare(
                seconds[f"ours.{part}"],
                seconds[f"{name}.{part}"],
                work=float(len(prompts) * STEPS),
                unit="tokens",
            )
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
