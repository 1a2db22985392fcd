"""What generation is made of: answers that grow, views of them, prompts as tokens, sampling."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from texts import tokenizer

from helix.command.prompt import quote_prompts
from helix.config.generation import batch_sizes, stop_texts
from helix.config.schema import ConfigError, GenerateConfig
from helix.generation.answers import Answer
from helix.generation.measure import phases
from helix.generation.passes import Steps
from helix.generation.sampling import chosen, ending_texts, ends_of, of_folder, padding
from helix.generation.tokens import Prompts, encode
from helix.generation.verify import Expected, compare
from helix.generation.views import Board, Lines, Stream, shown

END = 2


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def an_answer(text: str = "", stop: Sequence[str] = (), ends: bool = False) -> Answer:
    answer = Answer(tokenizer(), ids("before"), frozenset({END}), stop)
    for token in ids(text) + [END] * ends:
        answer.put(token)
    return answer


# Prompts as they are typed


@pytest.mark.parametrize(
    "text",
    ["The capital of France is", "Hello, world", "What's up?", "a=b", "café 日本", "x\\", "a\\'b", "C:\\new", "{a:1}",
     "42", "true", "str(3)", "'tis, said he", '"a"b', "${HOME} x", "\\${x}", "a  b ", "1e3", "$(ls)", "tab\tx",
     "f(x):\n  y"],
)  # fmt: skip
def test_a_prompt_means_itself(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    (word,) = quote_prompts([f"prompt={text}"])
    value = OverridesParser.create().parse_override(word).value()
    assert OmegaConf.create({"prompt": value}).prompt == text


def test_what_stays_hydras() -> None:
    words = ["model=a,b", "prompt=[a,b]", "prompt='x, y'", "prompt=null", "prompt=[a!"]
    assert quote_prompts(words) == words
    assert quote_prompts(["-m", "prompt=a,b"]) == ["-m", "prompt=a,b"]
    assert quote_prompts(["prompt=a,b"]) == ["prompt='a,b'"]


# Answers


def test_text_is_held_back_while_a_letter_is_incomplete() -> None:
    answer = an_answer("a ")
    whole = ids("日")
    seen = []
    for token in whole:
        answer.put(token)
        seen.append(answer.settled)
    assert len(whole) == 3
    assert seen == ["a ", "a ", "a 日"]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it() -> None:
    answer = an_answer(stop=["STOP", "never"])
    settled = []
    for token in ids("one ST two STOP three"):
        answer.put(token)
        settled.append(answer.settled)
    assert answer.finished
    assert answer.text == answer.settled == "one ST two "
    assert answer.count == len("one ST two STOP")
    assert settled[len("one ST") - 1] == "one "  # it may become one
    assert settled[len("one ST ") - 1] == "one ST "


def test_a_stop_text_ends_a_long_answer_and_is_not_looked_for_in_the_prompt() -> None:
    long = "日" + "x" * 100
    answer = an_answer(long + "before Stop!", stop=["p!", "efore\t"])
    assert (answer.finished, answer.text) == (True, long + "before Sto")
    answer = Answer(tokenizer(), ids("one\n"), frozenset(), ["\n"])
    answer.put(ids("a")[0])
    assert not answer.finished


def test_a_stop_text_may_be_a_new_line() -> None:
    assert stop_texts(GenerateConfig(stop=["\\n\\t", "x"])) == ("\n\t", "x")


def test_the_end_token_ends_it_and_padding_follows() -> None:
    answer = an_answer("yes", ends=True)
    answer.put(0)
    assert (answer.text, answer.count, answer.finished, answer.tokens) == ("yes", 4, True, ids("yes"))
    assert not an_answer("yes").finished


# Views


def screen(terminal: bool, width: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=6, color_system=None)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_answer_is_streamed_letter_by_letter() -> None:
    console, answer, growth = screen(terminal=False), an_answer(), []
    view = Stream(console, chat=False)
    view.begin(["before"])
    for token in ids(" 日!\x1b[2J"):
        answer.put(token)
        view.show([answer])
        growth.append(said(console))
    view.end([answer])
    assert growth[0] == "before "
    assert growth[1] == growth[2] == "before "
    assert said(console) == "before 日!\ufffd[2J\n\n"  # an escape sequence of the model's does nothing


def test_several_answers_in_a_pipe_are_said_when_they_end() -> None:
    console = screen(terminal=False)
    view = Lines(console, chat=False)
    view.begin(["p", "q"])
    first, second = an_answer("one"), an_answer("two", ends=True)
    view.show([first, second])
    view.show([first, second])
    assert said(console) == "[2] qtwo\n"
    view.end([first, second])
    view.begin(["r"])
    view.end([an_answer("x" * 60)])
    assert said(console) == "[2] qtwo\n[1] pone\n\n[3] r" + "x" * 60 + "\n\n"


def test_several_answers_on_a_terminal_have_a_line_each_however_long_they_grow() -> None:
    console = screen(terminal=True)
    view = Board(console, chat=True)
    answers = [an_answer("日本語" * 20), an_answer("a\nb", ends=True)] + [an_answer("x")] * 6
    view.begin(["p"] * 8)
    view.show(answers)
    frame = said(console)
    assert "and 4 more" in frame
    assert "p → a⏎b ✓" in frame
    assert all(len(line) <= 40 for line in frame.replace("\r", "\n").split("\n"))
    view.end(answers)
    assert "[2] p\na\nb\n" in said(console)


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert shown("a\x1b[31m\x07b\n\tc\u200f") == "a\ufffd[31m\ufffdb\n\tc\ufffd"


# Prompts as tokens


def test_batches_are_padded_on_the_left() -> None:
    found = encode(tokenizer(), ["abc", "d", "ef"], chat=False, batch=2, new=4, context=32)
    assert found.batches == [range(2), range(2, 3)]
    both = found.tensors(found.batches[0], 0, torch.device("cpu"))
    assert both["input_ids"].tolist() == [ids("abc"), [0, 0, *ids("d")]]
    assert both["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch_sizes(5, 2) == [2, 2, 1]


def test_a_chat_template_goes_around_each_prompt() -> None:
    found = encode(tokenizer(chat=True), ["abc"], chat=True, batch=2, new=4, context=32)
    assert list(found.ids[0]) == [3, *ids("abc"), END]
    with pytest.raises(ConfigError, match="needs a chat template"):
        encode(tokenizer(), ["abc"], chat=True, batch=2, new=4, context=32)


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    with pytest.raises(ConfigError, match=r"prompt 2 of 2 has 30 tokens, .* context of 32; .* at most 2"):
        encode(tokenizer(), ["a", "b" * 30], chat=False, batch=2, new=3, context=32)
    with pytest.raises(ConfigError, match=r"the prompt has 40 tokens.*; shorten it"):
        encode(tokenizer(), ["b" * 40], chat=False, batch=2, new=3, context=32)


# Sampling


class Folder:
    """What a model's folder may say, which is not what was asked for."""

    generation_config = None


def test_the_folders_own_sampling_does_not_count() -> None:
    greedy = chosen(GenerateConfig(max_new_tokens=7), Folder(), frozenset({2, 5}), 0)  # type: ignore[arg-type]
    assert (greedy.do_sample, greedy.num_beams, greedy.max_new_tokens, greedy.eos_token_id) == (False, 1, 7, [2, 5])
    drawn = chosen(GenerateConfig(temperature=0.5), Folder(), frozenset(), 0, limit=1)  # type: ignore[arg-type]
    assert (drawn.do_sample, drawn.temperature, drawn.top_k, drawn.top_p) == (True, 0.5, 0, 1.0)
    assert (drawn.max_new_tokens, drawn.eos_token_id) == (1, [2**31 - 1])  # None would mean the folder's


def test_a_folder_that_says_what_cannot_be_is_refused(tmp_path: Path) -> None:
    assert of_folder(tmp_path) is None
    for wrong in ('{"num_return_sequences": 2}', "[]", "{"):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"generation_config.json cannot be used: .*; correct it, or remove it"):
            of_folder(tmp_path)


def test_ends_and_padding() -> None:
    from transformers import GenerationConfig

    made = tokenizer()
    assert ends_of(None, GenerationConfig(eos_token_id=[7, 9]), made) == {7, 9}
    assert ends_of(None, None, made) == {END}
    assert ending_texts(made, ["<user>", "user", "<end>"]) == {3, END}  # texts that no answer's text ever holds
    assert padding(made, frozenset({END})) == 0
    made.pad_token = None
    assert padding(made, frozenset({7, 9})) == 7


# Figures


def test_phases_are_means_over_batches_and_over_tokens() -> None:
    first, each = phases([(0.0, (1.0, 2.0, 3.0)), (10.0, (12.0, 16.0))])
    assert (first, each) == (1.5, 2.0)
    assert phases([(0.0, (1.0,))]) == (1.0, None)


def test_the_first_token_that_differs_is_named() -> None:
    steps = Steps(torch.ones(3, 2, 4), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    expected = Expected([[1, 2, 3], [4, 5]], steps)
    same = compare([[1, 2, 3], [4, 5]], steps, expected)
    assert (same.tokens_equal, same.differing_prompts, same.first_difference, same.relative_error) == (
        True,
        (),
        None,
        0,
    )
    # Logits count until the step after the first other token: prompt 2's of the third step do not.
    logits = torch.tensor([1.0, 2.0, 9.0])[:, None, None] * torch.ones(3, 2, 4)
    logits[2, 0] = 1
    other = compare([[1, 2, 3], [4, 6]], Steps(logits, torch.tensor([[1, 2, 3], [4, 6, 6]])), expected)
    assert (other.tokens_equal, other.differing_prompts, other.first_difference) == (False, (2,), 2)
    assert other.relative_error == 1
    assert compare([[1, 2], [4, 5]], steps, expected).first_difference == 3


def test_prompts_keep_their_order() -> None:
    assert Prompts(("a", "b", "c"), ((1,), (2,), (3,)), 16).batches == [range(3)]
