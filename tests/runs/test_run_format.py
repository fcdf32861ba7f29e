"""The day of a run and the format of its conversations, and from which run it takes them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from run_folders import begin, open_run, refusal, with_data

from saro.config import DataConfig, RWConfig
from saro.data.chat_format import ChatFormat
from saro.errors import SaroError
from saro.model.source import ModelSource

pytestmark = pytest.mark.usefixtures("cache")


# The day


def test_the_day_is_the_one_given(folder):
    assert open_run(folder, with_data(template_date="1999-07-04")).template_date == date(1999, 7, 4)


def test_the_default_day_is_today(folder):
    before = date.today()
    assert before <= open_run(folder).template_date <= date.today()


@pytest.mark.parametrize("text", ["today", "04.07.1999", "1999-13-01", "1999-7-4"])
def test_an_invalid_day_is_refused(folder, text):
    assert refusal(folder, with_data(template_date=text)) == f"data.template_date is {text!r}; write it as YYYY-MM-DD"


@pytest.mark.parametrize("given", [None, "1999-07-04"], ids=["no day", "the same day"])
def test_a_resumed_run_keeps_the_day_on_which_it_began(folder, trained, data_file, given):
    """Here it is that of the run that trained its model."""
    begin(folder, trained, data_file).lock.release()
    assert open_run(folder, with_data(template_date=given), resume=True).template_date == date(1999, 7, 4)


def test_a_run_does_not_resume_on_another_day(folder, source, data_file):
    begin(folder, source, data_file, with_data(template_date="1999-07-04"))
    assert refusal(folder, with_data(template_date="2024-02-29"), resume=True) == (
        f"{folder}: the run began with data.template_date 1999-07-04, not 2024-02-29; "
        "resume with the same, or start over with --overwrite"
    )


def test_an_overwritten_run_has_a_new_day(folder, source, data_file):
    begin(folder, source, data_file, with_data(template_date="1999-07-04"))
    assert open_run(folder, overwrite=True).template_date > date(1999, 7, 4)


def test_a_given_day_that_the_template_does_not_read_is_refused(folder, source, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ date_string }}" + source.tokenizer.chat_template)
    given = DataConfig(chat_template=str(file), template_date="1999-07-04")
    with pytest.raises(SaroError, match=r"reads date_string, not the date; give .*date_string '04 Jul 1999'$"):
        open_run(folder).chat_format(source, given)
    open_run(folder).chat_format(source, replace(given, template_date=None))


# The format of conversations


def test_a_run_has_the_default_format_of_conversations_if_nothing_is_known(folder, source, data_file):
    chat = open_run(folder).chat_format(source, DataConfig())
    assert (chat.think_tags, chat.template_variables) == (("<think>", "</think>"), {})
    assert chat.template_date == open_run(folder).template_date


@pytest.fixture
def trained(tmp_path, source, data_file) -> ModelSource:
    """Make ``final/`` of a run that had its own tags, variables and date."""
    given = DataConfig(think_tags=("<a>", "</a>"), template_variables={"x": 1}, template_date="1999-07-04")
    folder = tmp_path / "earlier"
    begin(folder, source, data_file, RWConfig(data=given)).lock.release()
    shutil.copytree(source.path, folder / "final")
    return replace(source, path=str(folder / "final"))


FORMAT = (("<a>", "</a>"), {"x": 1}, date(1999, 7, 4))


def format_of(chat: ChatFormat) -> tuple[object, object, object]:
    return chat.think_tags, chat.template_variables, chat.template_date


def test_a_run_takes_tags_variables_and_date_from_the_run_that_trained_its_model(folder, trained, data_file):
    """Otherwise stage 2 would train the model on prompts that it has never seen, and on other ones every day."""
    assert format_of(open_run(folder).chat_format(trained, DataConfig())) == FORMAT
    begin(folder, trained, data_file)
    manifest = json.loads((folder / "manifest.json").read_text())
    recorded = manifest["config"]["data"]
    assert (recorded["think_tags"], recorded["template_variables"]) == (["<a>", "</a>"], {"x": 1})
    assert manifest["template_date"] == "1999-07-04"


def test_the_format_of_conversations_passes_through_several_runs(folder, trained, data_file, tmp_path):
    begin(tmp_path / "second", trained, data_file)
    third = replace(trained, path=str(shutil.copytree(trained.path, tmp_path / "second" / "final")))
    assert format_of(open_run(folder).chat_format(third, DataConfig())) == FORMAT


@pytest.mark.parametrize(
    "given",
    [{"think_tags": ("<b>", "</b>")}, {"template_variables": {}}, {"template_date": "1999-07-05"}],
    ids=lambda given: next(iter(given)),
)
def test_an_option_that_contradicts_the_run_that_trained_the_model_is_an_error(folder, trained, given):
    (name,) = given
    with pytest.raises(
        SaroError, match=rf"data\.{name} is .*, and the run that trained .*final had .*; leave the option"
    ) as e:
        open_run(folder).chat_format(trained, DataConfig(**given))
    assert "\n" not in str(e.value)


def test_options_that_agree_with_the_run_that_trained_the_model_may_be_given(folder, trained):
    given = DataConfig(think_tags=("<a>", "</a>"), template_variables={"x": 1}, template_date="1999-07-04")
    assert format_of(open_run(folder).chat_format(trained, given)) == FORMAT


def test_another_template_than_that_of_the_run_that_trained_the_model_is_an_error(folder, trained, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(trained.tokenizer.chat_template)
    assert format_of(open_run(folder).chat_format(trained, DataConfig(chat_template=str(file)))) == FORMAT
    file.write_text(trained.tokenizer.chat_template + " ")
    with pytest.raises(SaroError, match=r"is not the template of the run that trained .*final; leave the option out"):
        open_run(folder).chat_format(trained, DataConfig(chat_template=str(file)))


def test_a_copy_of_a_model_without_its_run_tells_nothing(folder, trained, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = replace(trained, path=str(shutil.copytree(trained.path, tmp_path / "elsewhere" / "final")))
    run = open_run(folder)
    assert format_of(run.chat_format(copy, DataConfig())) == (("<think>", "</think>"), {}, run.template_date)


def test_a_resumed_run_keeps_its_format_of_conversations_although_its_start_is_gone(folder, trained, data_file):
    begin(folder, trained, data_file)
    (Path(trained.path).parent / "manifest.json").unlink()
    assert format_of(open_run(folder, resume=True).chat_format(trained, DataConfig())) == FORMAT
    other = RWConfig(data=DataConfig(think_tags=("<b>", "</b>")))
    assert "the run began with data.think_tags ['<a>', '</a>'], not ['<b>', '</b>']" in refusal(
        folder, other, resume=True
    )
    other = RWConfig(data=DataConfig(template_variables={}))
    assert "the run began with data.template_variables {'x': 1}, not {}" in refusal(folder, other, resume=True)
