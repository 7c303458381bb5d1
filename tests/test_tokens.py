"""Text sources, tokenizer, chat template, packing and overlap."""

import gzip
import json
import pathlib

import numpy as np
import pytest
import tokenizers

import sqjax
from sqjax.run import InputError
from sqjax.texts import Document, read_texts
from sqjax.tokens import PROMPT, RESPONSE, TEMPLATE, Tokenizer, encode_conversation, pack, pack_windows

PACKAGE = pathlib.Path(sqjax.__file__).parent
GOLDEN = json.loads((pathlib.Path(__file__).parent / "data/cross_entropy_demo8.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(PACKAGE / "demo8")


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def text_document(text, domain="d"):
    return Document(text, None, "memory", domain)


# Packing ---------------------------------------------------------------------------------------------------------


def test_packing_joins_documents_closed_by_end_of_text(tokenizer):
    texts = [
        "One small document.",
        "",
        "Another, über 4,096 <|im_start|> tokens?\n\n",
        "def f(x):\n    return x\n" * 40,
    ]
    core = tokenizers.Tokenizer.from_file(str(PACKAGE / "demo8/tokenizer.json"))
    stream = []
    for text in texts:
        stream += [*core.encode(text, add_special_tokens=False).ids, core.token_to_id("<|endoftext|>")]
    windows = pack([text_document(text) for text in texts], tokenizer, 32)
    assert windows.dtype == np.int32
    assert windows.tolist() == [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    assert pack([text_document(text) for text in texts], tokenizer, 32, 2).tolist() == windows[:2].tolist()


def test_packing_agrees_with_the_independent_script(tokenizer):
    windows = pack(read_texts([PACKAGE / "suites/demo.txt"]), tokenizer, GOLDEN["length"])
    assert len(windows) == GOLDEN["total_tokens"] // GOLDEN["length"]
    assert windows[: len(GOLDEN["tokens"])].tolist() == GOLDEN["tokens"]


def test_packing_reads_no_further_than_it_needs(tokenizer):
    def endless():
        while True:
            yield text_document("word " * 100_000)

    assert pack(endless(), tokenizer, 128, 3).shape == (3, 128)


def test_a_window_has_the_domain_of_most_of_its_tokens(tokenizer):
    documents = [text_document(" word" * count, domain) for count, domain in ((299, "a"), (319, "b"), (9, "c"))]
    assert pack_windows(documents, tokenizer, 100).domains == ("a", "a", "a", "b", "b", "b")


@pytest.mark.parametrize(("length", "windows"), [(1, None), (16, 0), (4096, None)])
def test_packing_refuses_what_cannot_be_cut(tokenizer, length, windows):
    with pytest.raises(InputError):
        pack([text_document("short")], tokenizer, length, windows)


# Sources ---------------------------------------------------------------------------------------------------------


def test_sources_keep_their_order_and_domain(tmp_path):
    (tmp_path / "b.txt").write_text("from b", encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "a1"}, {"text": "a2", "domain": "named"}])
    (tmp_path / "notes.md").write_text("not text of ours", encoding="utf-8")
    documents = list(read_texts([tmp_path]))
    assert [(d.text, d.domain) for d in documents] == [("a1", "a"), ("a2", "named"), ("from b", "b")]


def test_a_seed_permutes_and_repeats(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(50)])
    order = [[d.text for d in read_texts([path], seed=seed)] for seed in (1, 1, 2)]
    assert order[0] == order[1] != order[2]
    assert sorted(order[0]) == sorted(order[2]) == sorted(d.text for d in read_texts([path]))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": 3}\n', "must be a string"),
        (b'{"prompt": "x"}\n', "neither `text` nor `messages`"),
        (b'{"text": "x"}\n{broken\n', ":2 is not JSON"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
        (b'{"messages": ["hello"]}\n', "list of objects"),
        (b'["text"]\n', "neither"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, complaint):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as error:
        list(read_texts([path]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.txt", "no such/folder/here", "weights.bin", "empty"])
def test_sources_that_do_not_exist_are_refused_at_once(tmp_path, name):
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        read_texts([tmp_path / name])


def test_a_truncated_archive_is_the_inputs_fault(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", [{"text": str(i)} for i in range(1000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_texts([path]))


def test_an_unreachable_data_set_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(InputError) as error:
        next(iter(read_texts(["nobody/no-such-data-set"])))
    assert "\n" not in str(error.value)


def test_sources_split_by_kind(tmp_path):
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}])
    chat = write_jsonl(tmp_path / "c.jsonl", [{"messages": GOLDEN["chat"]["messages"]}])
    plain, spoken = read_texts([chat, texts]).by_kind()
    assert (plain.files, spoken.files) == ((texts,), (chat,))


# Conversations ---------------------------------------------------------------------------------------------------


def test_chat_template_renders_as_transformers_does(tokenizer):
    chat = GOLDEN["chat"]
    assert tokenizer.render(chat["messages"]) == chat["rendered"]
    assert tokenizer.render(chat["messages"], add_generation_prompt=True) == chat["with_generation_prompt"]


def test_roles_partition_a_conversation(tokenizer):
    document = Document(None, tuple(GOLDEN["chat"]["messages"]), "memory", "chat")
    conversation = encode_conversation(document, tokenizer)
    assert conversation.tokens_T.tolist() == GOLDEN["chat"]["tokens"]
    by_role = {
        role: tokenizer.decode(conversation.tokens_T[conversation.roles_T == role])
        for role in (TEMPLATE, PROMPT, RESPONSE)
    }
    spoken = [message["content"] for message in GOLDEN["chat"]["messages"]]
    assert by_role[RESPONSE] == spoken[2]
    assert by_role[PROMPT] == spoken[0] + spoken[1] + spoken[3]
    assert by_role[TEMPLATE].count("<|im_start|>") == by_role[TEMPLATE].count("<|im_end|>") == 4


def test_roles_are_found_where_the_template_strips(tokenizer):
    stripping = with_template(
        tokenizer, tokenizer.chat_template.replace("message['content']", "message['content']|trim")
    )
    document = Document(None, ({"role": "assistant", "content": "  yes, yes \n"},), "memory", "chat")
    conversation = encode_conversation(document, stripping)
    assert tokenizer.decode(conversation.tokens_T[conversation.roles_T == RESPONSE]) == "yes, yes"


def with_template(tokenizer, source):
    return Tokenizer(core=tokenizer.core, chat_template=source, eos_token="<|im_end|>")


def test_templates_may_use_what_transformers_offers(tokenizer):
    source = """
    {%- if tools is none and not documents %}none {% endif %}
    {%- for m in messages %}
        {%- if loop.index0 == 1 %}{% break %}{% endif %}
        {%- generation %}{{ m | tojson }}{% endgeneration %}
    {%- endfor %}{{ eos_token }}{{ bos_token }}{{ strftime_now("%Y") | length }}"""
    rendered = with_template(tokenizer, source).render([{"role": "user", "content": "<é>"}, {"role": "x"}])
    assert rendered == 'none {"role": "user", "content": "<é>"}<|im_end|>4'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content.missing.name }}",
        "{% for %}",
        None,
    ],
)
def test_templates_cannot_escape_and_their_complaints_are_the_inputs_fault(tokenizer, source):
    with pytest.raises(InputError):
        with_template(tokenizer, source).render([{"role": "user", "content": "x"}])
