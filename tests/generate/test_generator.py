"""The generator against a plain loop over full forward passes, against transformers, and against scripts."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.config import GenerateConfig
from scratchlm.errors import UserError
from scratchlm.generate import Generator, row_generator, sample
from scratchlm.model import ModelConfig, Transformer
from scratchlm.tokenizer import Tokenizer

END = "<|endoftext|>"
BYTES = {byte: bytes([byte]) for byte in range(256)}
TOKENIZER = Tokenizer(BYTES, [], special_tokens=[END])
CONTEXT = 16


def build(**fields) -> Transformer:
    base = {
        "vocab_size": 257,
        "context_length": CONTEXT,
        "d_model": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "d_ff": 48,
    }
    # Double precision: a greedy choice must not hang on the order in which a sum was taken.
    return Transformer(ModelConfig(**{**base, **fields}), seed=0).double().eval()


MODEL = build()
GENERATOR = Generator(MODEL, TOKENIZER)
GREEDY = {"temperature": 0.0, "stop": []}


@torch.no_grad()
def by_full_passes(
    model, ids, max_tokens, temperature=0.0, top_k=None, top_p=1.0, seed=0, row=0, stop=(), decode=TOKENIZER.decode
):
    """The same by definition: no cache, no batch, every window read from its beginning."""
    context, window, out = model.config.context_length, list(ids[-model.config.context_length :]), []
    generator = row_generator(seed, row)
    while len(out) < max_tokens:
        token = int(sample(model(torch.tensor([window]))[:, -1], temperature, top_k, top_p, [generator]))
        if token in stop:
            break
        out.append(token)
        window.append(token)
        if len(window) > context:
            window = window[-max(1, context // 2) :]
    return decode(out)


def quietly(call, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


# One text after another, and many at once


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.text(alphabet="abc dé\n", min_size=1, max_size=20), min_size=1, max_size=4),
    max_tokens=st.integers(0, 40),
)
def test_a_batch_of_prompts_equals_each_alone_and_a_plain_loop(prompts, max_tokens):
    together = quietly(GENERATOR.generate, prompts, max_tokens=max_tokens, **GREEDY)
    assert together == [
        quietly(GENERATOR.generate, prompt, max_tokens=max_tokens, **GREEDY)[0] for prompt in prompts
    ]
    assert together == [by_full_passes(MODEL, TOKENIZER.encode(prompt), max_tokens) for prompt in prompts]


@pytest.mark.parametrize("context", [1, 2, 3, 16])
def test_far_beyond_the_context(context):
    model = build(context_length=context)
    generator = Generator(model, TOKENIZER)
    prompts = ["a", "bcd", "efghijklmnopqrstuvw"]
    found = quietly(generator.generate, prompts, max_tokens=3 * context + 5, **GREEDY)
    assert found == [by_full_passes(model, TOKENIZER.encode(prompt), 3 * context + 5) for prompt in prompts]


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9, "temperature": 1.5}], ids=str
)
def test_sampling_equals_the_plain_loop_row_by_row(options):
    prompts = ["one", "another prompt", "x"]
    options = {"temperature": 0.9, **options}
    found = GENERATOR.generate(prompts, max_tokens=30, stop=[], seed=11, **{"top_p": 1.0, **options})
    for row, prompt in enumerate(prompts):
        assert found[row] == by_full_passes(MODEL, TOKENIZER.encode(prompt), 30, seed=11, row=row, **options)


def test_rows_that_end_leave_the_others_undisturbed():
    stop = [chr(code) for code in range(40, 80)]  # ordinary bytes that count as special: about one token in six
    tokenizer = Tokenizer(BYTES, [], special_tokens=[END, *stop])
    prompts = ["a", "bcd", "ef", "ghijk", "l", "mnop"]
    found = Generator(MODEL, tokenizer).generate(
        prompts, max_tokens=40, temperature=1.0, top_p=1.0, stop=stop, seed=2
    )
    ends = {tokenizer.special_tokens[token] for token in stop}
    alone = [
        by_full_passes(MODEL, tokenizer.encode(prompt), 40, temperature=1.0, seed=2, row=row, stop=ends)
        for row, prompt in enumerate(prompts)
    ]
    assert found == alone
    assert len({len(text) for text in alone}) > 2  # they did end at different times


def test_the_seed_decides_and_rows_do_not_depend_on_each_other():
    def draw(prompts, seed):
        return GENERATOR.generate(prompts, max_tokens=20, temperature=1.0, top_p=1.0, stop=[], seed=seed)

    torch.manual_seed(1)
    first = draw(["a", "b", "a"], 5)
    torch.manual_seed(2)  # the global generator has no say
    assert draw(["a", "b", "a"], 5) == first
    assert draw(["a", "b", "a"], 6) != first
    assert first[0] != first[2]
    assert draw(["quite different", "b"], 5)[1] == first[1]


def test_greedy_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = MODEL.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.resolved_d_ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.resolved_kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope.theta[0],
            tie_word_embeddings=False,
        )
    ).double()
    weights = {"model.embed_tokens.weight": MODEL.embedding.weight, "model.norm.weight": MODEL.norm.weight}
    weights["lm_head.weight"] = MODEL.head.weight
    for layer, block in enumerate(MODEL.blocks):
        at = f"model.layers.{layer}."
        for name, part in zip("qkv", block.attention.qkv.weight.split(block.attention.qkv.parts), strict=True):
            weights[f"{at}self_attn.{name}_proj.weight"] = part
        weights[f"{at}self_attn.o_proj.weight"] = block.attention.output.weight
        for name, part in zip(("gate", "up"), block.feedforward.gate_up.weight.chunk(2), strict=True):
            weights[f"{at}mlp.{name}_proj.weight"] = part
        weights[f"{at}mlp.down_proj.weight"] = block.feedforward.down.weight
        weights[f"{at}input_layernorm.weight"] = block.attention_norm.weight
        weights[f"{at}post_attention_layernorm.weight"] = block.feedforward_norm.weight
    theirs.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    theirs.eval()
    for prompt in ("a", "hello", "\u00e9\u00e8"):
        ids = TOKENIZER.encode(prompt)
        new = CONTEXT - len(ids)
        out = theirs.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert GENERATOR.generate(prompt, max_tokens=new, **GREEDY) == [TOKENIZER.decode(out[0, len(ids) :])]


# Work done


class Spy(Transformer):
    """Notes the shape of everything it reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, seed=0)
        self.shapes: list[tuple[int, ...]] = []

    def hidden(self, ids, positions=None, documents=None, cache=None, prefix=None):
        self.shapes.append(tuple(ids.shape))
        assert not self.training
        return super().hidden(ids, positions, documents, cache)


def test_each_token_costs_one_position_and_a_slide_half_a_context():
    spy = Spy(MODEL.config)
    Generator(spy, TOKENIZER).generate(["hello", "hi"], max_tokens=CONTEXT, **GREEDY)
    half = CONTEXT // 2
    assert spy.shapes[:12] == [(2, 5), *[(2, 1)] * 11]
    assert spy.shapes[12] == (
        2,
        14,
    )  # "hello" has grown to 17 and slides to 8; "hi" is at 14 and is read again beside it
    spy.shapes.clear()
    Generator(spy, TOKENIZER).generate("x" * CONTEXT, max_tokens=half + 3, **GREEDY)
    assert spy.shapes == [(1, CONTEXT), (1, half), *[(1, 1)] * half, (1, half)]


def test_the_model_is_left_as_it_was():
    spy = Spy(MODEL.config).train()
    Generator(spy, TOKENIZER).generate("a", max_tokens=2, **GREEDY)
    assert spy.training
    assert all(parameter.grad is None for parameter in spy.parameters())


def test_a_stream_works_only_as_far_as_it_is_read():
    spy = Spy(MODEL.config)
    pieces = Generator(spy, TOKENIZER).stream("a", max_tokens=10, **GREEDY)
    assert spy.shapes == []
    next(pieces)
    assert 1 <= len(spy.shapes) <= 4  # a character has at most four bytes


# Scripts: a model that says what it is told, token after token


class Script:
    """Whatever it reads, at position i of row r it predicts ``script[r][i]``."""

    training = False

    def __init__(self, *script: list[int], vocab_size: int, context_length: int = 1000) -> None:
        self.script, self.config = (
            script,
            ModelConfig(vocab_size=vocab_size, context_length=context_length, layers=0),
        )

    def parameters(self):
        return iter([torch.zeros(1)])

    def hidden(self, ids, positions, cache):
        rows = torch.tensor([list(row) + [0] * (1000 - len(row)) for row in self.script])
        return rows.gather(1, positions)[..., None]

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0], self.config.vocab_size).double()


def scripted(tokenizer: Tokenizer, *script: list[int], **options) -> Generator:
    return Generator(Script(*script, vocab_size=tokenizer.vocab_size, **options), tokenizer)  # type: ignore[arg-type]


MERGED = {
    **BYTES,
    256: "\u20ac".encode(),
    257: "\u20ac".encode()[:2],
    258: "\U0001f600".encode()[1:],
    259: b" the",
    260: "\u00fc\u00e9".encode()[1:],
}
WIDE = Tokenizer(MERGED, [], special_tokens=[END])
byte_sequences = st.lists(
    st.binary(max_size=6) | st.text(max_size=4).map(lambda text: text.encode("utf-8", "ignore"))
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(data=byte_sequences.filter(lambda data: len(data) < 200))
def test_streamed_pieces_join_to_the_decoded_whole_whatever_the_bytes(data):
    ids = list(data)
    pieces = list(scripted(TOKENIZER, ids).stream("a", max_tokens=len(ids), **GREEDY))
    assert "".join(pieces) == data.decode("utf-8", "replace") == TOKENIZER.decode(ids)
    assert all(pieces)  # none is empty
    assert scripted(TOKENIZER, ids).generate("a", max_tokens=len(ids), **GREEDY) == ["".join(pieces)]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 260), max_size=60))
def test_so_do_those_of_tokens_longer_than_a_byte(ids):
    pieces = list(scripted(WIDE, ids).stream("a", max_tokens=len(ids), **GREEDY))
    assert "".join(pieces) == WIDE.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_no_piece_ends_inside_a_character(text):
    data = text.encode("utf-8", "ignore")
    pieces = list(scripted(TOKENIZER, list(data)).stream("a", max_tokens=len(data), **GREEDY))
    assert pieces == list(data.decode())  # a character comes with its last byte, not before and not after


def test_a_character_split_over_tokens_is_held_back():
    ids = [*b"n", 257, 0xAC, 0xF0, 258, 259]
    pieces = scripted(WIDE, ids).stream("a", max_tokens=len(ids), **GREEDY)
    assert list(pieces) == ["n", "\u20ac", "\U0001f600", " the"]
    cut = scripted(WIDE, ids).stream("a", max_tokens=2, **GREEDY)  # the text ends inside the euro sign
    assert list(cut) == ["n", "\ufffd"]


def test_stop_tokens_end_a_row_and_are_left_out():
    tokenizer = Tokenizer(BYTES, [], special_tokens=[END, "<|user|>"])
    end, user = tokenizer.special_tokens[END], tokenizer.special_tokens["<|user|>"]
    ids = [*b"ab", user, *b"cd", end, *b"ef"]

    def text(stop, **options):
        return scripted(tokenizer, ids).generate("x", max_tokens=8, temperature=0.0, stop=stop, **options)[0]

    assert text([END]) == "ab<|user|>cd"
    assert text([END, "<|user|>"]) == "ab"
    assert text([]) == f"ab<|user|>cd{END}ef"
    assert (
        "".join(scripted(tokenizer, ids).stream("x", max_tokens=8, temperature=0.0, stop=[END])) == "ab<|user|>cd"
    )
    assert scripted(tokenizer, [end]).generate("x", max_tokens=8, temperature=0.0, stop=[END]) == [""]


def test_rows_of_a_batch_end_each_in_their_own_time():
    end = TOKENIZER.special_tokens[END]
    prompts = ["a", "bb", "ccc", "dddd"]
    # A script of its own for each row cannot survive rows that leave: give all the same one, entered at different places.
    ids = [*b"0123456789", end, *b"abcdefgh"]
    found = scripted(TOKENIZER, ids, ids, ids, ids).generate(prompts, max_tokens=9, temperature=0.0, stop=[END])
    assert found == ["012345678", "123456789", "23456789", "3456789"]


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_few_tokens(max_tokens):
    ids = list(b"xyz")
    assert scripted(TOKENIZER, ids).generate("a", max_tokens=max_tokens, **GREEDY) == ["xyz"[:max_tokens]]
    assert "".join(scripted(TOKENIZER, ids).stream("a", max_tokens=max_tokens, **GREEDY)) == "xyz"[:max_tokens]
    spy = Spy(MODEL.config)
    Generator(spy, TOKENIZER).generate("a", max_tokens=max_tokens, **GREEDY)
    assert len(spy.shapes) == max_tokens  # the last token is not read again


def test_no_prompts_no_texts():
    assert GENERATOR.generate([], max_tokens=5) == []


# Prompts


def test_an_empty_prompt_starts_after_the_first_special_token():
    found = GENERATOR.generate("", max_tokens=10, **GREEDY)
    assert found == [by_full_passes(MODEL, [TOKENIZER.special_tokens[END]], 10)]
    assert found == GENERATOR.generate(END, max_tokens=10, **GREEDY)  # special tokens are recognised in prompts
    with pytest.raises(UserError, match="this tokenizer has none; give a text"):
        Generator(MODEL, Tokenizer(BYTES, [])).generate("", **GREEDY)


def test_an_empty_prompt_starts_after_the_separator_that_is_given():
    tokenizer = Tokenizer(BYTES, [], special_tokens=["<|pad|>", END])
    model = build(vocab_size=258)
    pad, end = tokenizer.special_tokens["<|pad|>"], tokenizer.special_tokens[END]
    expected = {start: by_full_passes(model, [start], 10, decode=tokenizer.decode) for start in (pad, end, 65)}
    assert len(set(expected.values())) == 3  # the start does matter
    for separator, start in ((None, pad), (end, end), (pad, pad)):
        generator = Generator(model, tokenizer, separator_id=separator)
        assert generator.generate("", max_tokens=10, **GREEDY) == [expected[start]]
        assert "".join(generator.stream("", max_tokens=10, **GREEDY)) == expected[start]
    bare = Tokenizer(BYTES, [])  # any id will do; a tokenizer without special tokens has a start by it, too
    assert Generator(build(), bare, separator_id=65).generate("", max_tokens=10, **GREEDY) == [
        by_full_passes(MODEL, [65], 10)
    ]
    with pytest.raises(UserError, match="the separator 256 is no id of the tokenizer"):
        Generator(model, bare, separator_id=256)


def test_progress_counts_the_tokens_and_is_silent_unless_asked(capfd):
    quiet = GENERATOR.generate(["a", "b"], max_tokens=7, **GREEDY)
    assert capfd.readouterr().err == ""
    assert GENERATOR.generate(["a", "b"], max_tokens=7, show_progress=True, **GREEDY) == quiet
    assert "7/7" in capfd.readouterr().err


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_of_a_prompt_longer_than_the_context_the_tail_is_read(call):
    prompt = "".join(map(chr, range(40, 40 + 2 * CONTEXT + 3)))
    with pytest.warns(
        UserWarning, match=f"has {2 * CONTEXT + 3} tokens, the model reads {CONTEXT}: only its tail"
    ) as caught:
        found = "".join(getattr(GENERATOR, call)(prompt, max_tokens=12, **GREEDY))
    assert caught[0].filename == __file__  # it points at the caller
    assert found == GENERATOR.generate(prompt[-CONTEXT:], max_tokens=12, **GREEDY)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # exactly the context is no reason to warn
        GENERATOR.generate(prompt[-CONTEXT:], max_tokens=1, **GREEDY)


def test_ids_the_tokenizer_does_not_know_are_never_sampled():
    model = build(vocab_size=300)  # rounded up, as models often are
    with torch.no_grad():
        model.head.weight.zero_()  # all logits equal: 43 of 300 ids are unknown
    text = Generator(model, TOKENIZER).generate("a", max_tokens=400, temperature=1.0, top_p=1.0, stop=[])[0]
    assert len(text) > 0  # decoding an unknown id would have raised
    ids = itertools.chain.from_iterable(
        step
        for step in Generator(model, TOKENIZER)._tokens([[1]], GenerateConfig(max_tokens=400, top_p=1.0), set())
    )
    assert max(token for _, token in ids) <= 256


# Errors


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stop": ["<eos>"]},
            r"generate.stop names '<eos>', which is no special token of the tokenizer \(<\|endoftext\|>\)",
        ),
        ({"temperature": -1.0}, "generate: temperature = -1.0: input should be greater than or equal to 0"),
        ({"top_k": 0}, "generate: top_k = 0"),
        ({"top_p": 0.0}, "generate: top_p = 0.0"),
        ({"top_p": 1.01}, "generate: top_p = 1.01"),
        ({"max_tokens": -1}, "generate: max_tokens = -1"),
        ({"temprature": 1.0}, "unknown field temprature; did you mean temperature"),
    ],
)
def test_bad_options_are_named_at_the_call(call, options, message):
    with pytest.raises(UserError, match=message):
        getattr(GENERATOR, call)("a", **options)


def test_a_tokenizer_of_another_model_is_noticed():
    small = build(vocab_size=100)
    with pytest.raises(UserError, match=r"token id \d+") as caught:
        Generator(small, TOKENIZER).generate("\u00e9", **GREEDY)
    assert "vocabulary ends at 99" in str(caught.value)


def test_a_model_that_is_not_finite_is_a_plain_error():
    model = build()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are NaN"):
        Generator(model, TOKENIZER).generate("a", **GREEDY)


def test_a_config_and_options_that_override_it():
    config = GenerateConfig(temperature=0.0, max_tokens=5, stop=[])
    assert GENERATOR.generate("a", config) == GENERATOR.generate("a", max_tokens=5, **GREEDY)
    assert len(TOKENIZER.encode(GENERATOR.generate("abc", config, max_tokens=1)[0])) <= 3
    assert GENERATOR.generate("a", config, max_tokens=0) == [""]
