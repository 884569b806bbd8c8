from __future__ import annotations

import bisect
import gzip
from pathlib import Path

import pytest

from blitzjax import arrivals
from blitzjax.arrivals import Arrival
from blitzjax.errors import ConfigError

FORMATS = {
    "burst.csv": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
                 "5,a,1.5,ChatGPT,472,18,490,Conversation log\n45,b,1,GPT-4,1087,0,1087,API log\n"
                 "7.5,c,1,GPT-4,30,20,50,API log\n",
    "mooncake.jsonl": '{"timestamp": 27482, "input_length": 472, "output_length": 18, "hash_ids": [1]}\n'
                      '{"timestamp": 29982, "input_length": 30, "output_length": 20, "hash_ids": []}\n',
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5000000,472,18\n"
                 "2023-11-16 18:15:49.0000000,30,20\n",
    "azure_2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01.500000+00:00,472,18\n"
                      "2024-05-10 00:00:04+00:00,30,20\n",
    "own.csv": "timestamp_ms,prefill,decode\n100,472,18\n2600,30,20\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMATS[name])
    assert arrivals.read(tmp_path / name) == [Arrival(0.0, 472, 18), Arrival(2.5, 30, 20)]
    as_editors_save = "\ufeff" + FORMATS[name].replace("\n", "\r\n") + "\r\n"
    (tmp_path / name).write_bytes(as_editors_save.encode())
    assert arrivals.read(tmp_path / name) == [Arrival(0.0, 472, 18), Arrival(2.5, 30, 20)]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(FORMATS[name].encode()))
    assert arrivals.read(tmp_path / f"{name}.gz") == arrivals.read(tmp_path / name)


def test_the_azure_traces_are_the_published_ones() -> None:
    code, conv = (arrivals.read(arrivals.find(f"azure_{kind}")) for kind in ("code", "conv"))
    assert (len(code), len(conv)) == (8819, 19366)
    assert round(sum(a.prompt_tokens for a in code) / len(code)) == 2048
    assert round(sum(a.answer_tokens for a in conv) / len(conv)) == 211


OURS = "arrival_s,input_tokens,output_tokens\n1,2,3\n"


@pytest.mark.parametrize(("text", "says"), [
    (OURS + "nan,2,3", "row 2: arrival_s is no time: nan"), (OURS + "inf,2,3", "row 2: arrival_s is no time: inf"),
    (OURS + "2,1e999,3", "row 2: cannot convert float infinity"), (OURS + "2", "row 2: float")])
def test_a_bad_row_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=f"t.csv: {says}"):
        arrivals.read(tmp_path / "t.csv")


def test_json_lines_that_lack_a_name_or_cannot_be_parsed_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(FORMATS["mooncake.jsonl"] + '{"timestamp": 1}')
    with pytest.raises(ConfigError, match="row 3: it has no 'input_length'"):
        arrivals.read(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="recursion"):
        arrivals.read(tmp_path / "t.jsonl")
    squeezed = bytearray(gzip.compress(OURS.encode() * 100))
    squeezed[12:14] = b"xx"
    (tmp_path / "t.csv.gz").write_bytes(squeezed)
    with pytest.raises(ConfigError, match="t.csv.gz"):
        arrivals.read(tmp_path / "t.csv.gz")


@pytest.mark.parametrize(("text", "says"), [("a,b\n1,2\n", "unknown columns a, b"), ("", "no requests"),
                                            ("arrival_s,input_tokens,output_tokens\n1,x,3\n", "could not convert")])
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=f"t.csv.*{says}"):
        arrivals.read(tmp_path / "t.csv")


def test_scaling_keeps_the_pattern_and_the_sizes() -> None:
    trace = arrivals.window(arrivals.read(arrivals.find("azure_code")), 600, 600)
    scaled = list(arrivals.scale(trace, 2.5, seed=1))
    assert scaled == list(arrivals.scale(trace, 2.5, seed=1)) != list(arrivals.scale(trace, 2.5, seed=2))
    assert len(scaled) / len(trace) == pytest.approx(2.5, rel=0.05)
    assert [a.prompt_tokens for a in scaled[: len(trace)]] == [a.prompt_tokens for a in trace]
    assert [a.at for a in scaled] == sorted(a.at for a in scaled)
    times = sorted(a.at for a in trace)  # bursts stay bursts, silence stays silence
    assert all(a.at - times[bisect.bisect(times, a.at) - 1] < 0.1 for a in scaled)
    dealt = arrivals.deal(trace, 3, seed=1)
    shares = [sum(a.model == k for a in dealt) / len(trace) for k in range(3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.05)
    assert {a.model for a in arrivals.scale(dealt, 0.5, seed=1)} == {0, 1, 2} and arrivals.deal(trace, 1, 1) == trace
    half = list(arrivals.scale(trace, 0.5, seed=1))
    assert len(half) / len(trace) == pytest.approx(0.5, rel=0.15)
