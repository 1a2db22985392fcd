"""Plans that are impossible: which limit binds, by how much, and the nearest layout that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import helix
from helix.config.schema import ConfigError, Misfit
from helix.partition.grid import PartitionError
from helix.planner import catalogue
from helix.planner.candidates import Asked


@pytest.mark.parametrize(
    ("model", "devices", "given", "sentence"),
    [
        ("llama3_70b", 1, {}, r"memory binds: llama3_70b needs at least 142 GB a device on 1 device of dgx_h100 "
         r"\(single: weights 141 GB, activations [\d.]+ [MG]B\), 68\.\d GB more than the 73\.6 GB that may be filled; "
         r"the nearest that fits is helix_1x2 on 2 devices, with 7[01]\.\d GB each"),
        ("llama3_70b", 83, {"batch": 4}, r"divisibility binds: no layout of 83 devices \(a prime number\) "
         r"divides llama3_70b: n divides kv_heads=8, or heads=64 with key/value heads copied, m divides 64 "
         r"features, data the batch of 4, cuts of the sequence divide 1024, and stage is at most 80; one of them "
         r"would have to be 83; the nearest that fits is \w+ on 84 devices"),
        ("llama3_70b", 97, {"batch": 97, "asked": Asked(stage=97)}, r"layers bind: stage=97 is 17 more pipeline "
         r"stages than the 80 layers of llama3_70b; the nearest that fits is"),
        ("llama3_70b", 64, {"batch": 8, "asked": Asked(data=16)}, "the batch binds: data=16 is 8 more replicas than "
         "the batch of 8 sequences; the nearest that fits is .* on 64 devices"),
        ("llama3_70b", 6, {"batch": 8, "asked": Asked(data=3)}, r"the batch binds: data=3 \(replicas\) does not "
         r"divide the batch of 8 sequences \(2 left over\)"),
        ("llama3_70b", 64, {"asked": Asked(m=3)}, "head_dim binds: m=3 slices do not divide the 64 pairs of features "
         "of a head of llama3_70b; the nearest that fits is helix_2x"),
        ("llama3_70b", 128, {"asked": Asked(m=128)}, "head_dim binds: m=128 slices are 64 more than the 64 pairs"),
        ("llama3_70b", 12, {"asked": Asked(n=12)}, r"heads bind: n=12 groups do not divide the 64 heads \(8 key"),
        ("llama3_70b", 8, {"asked": Asked(m=2, n=2, data=4), "batch": 4}, r"the devices bind: m=2 \(feature slices\) "
         r"x n=2 \(head groups\) x data=4 \(replicas\) are 16 ranks, 8 more than 8 devices; the nearest that fits is "
         "helix_1x2_dp4 on 8 devices"),
        ("smollm2", 37, {}, r"divisibility binds: no layout of 37 devices \(a prime number\) divides smollm2: .* "
         r"cuts of the sequence divide 1024, and stage is at most 30; one of them would have to be 37; the "
         r"nearest that fits is \w+ on 3[68] devices"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused_in_one_sentence(
    model: str, devices: int, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Misfit, match=f"^{sentence}"):
        helix.plan(model, "dgx_h100", devices, **given)


def test_by_how_much_devices_are_too_many_where_sequences_are_not_cut() -> None:
    with pytest.raises(Misfit, match=r"batch of 1, and stage is at most 30; one of .* and the longest is 19 short"):
        helix.plan("smollm2", "dgx_h100", 83, mode="generate")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"mode": "infer"}, "mode cannot be 'infer'; choose one of: forward, train, generate"),
        ({"precision": "bf16"}, "precision cannot be 'bf16'.*; choose one of: 64-true, 32-true"),
        ({"devices": 0}, "devices must be at least 1, not 0"),
        ({"devices": -1}, "devices must be at least 1, not -1"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"mode": "generate", "new_tokens": 0}, "new_tokens must be at least 1, not 0"),
        ({"mode": "train", "asked": Asked(recompute="sel")}, "recompute cannot be 'sel'.*none, selective, full"),
        ({"asked": Asked(stage=0)}, "stage must be at least 1, not 0"),
        ({"asked": Asked(recompute="full")}, "recompute=full is of mode=train, not of mode=forward; leave it out"),
        ({"mode": "generate", "asked": Asked(shard_data=True)}, "shard_data=true is of mode=train, not of mode=gen"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        helix.plan("smollm2", "dgx_h100", **({"devices": 8} | given))


def test_what_a_ranks_process_takes_is_no_room() -> None:
    """Beside 20 GB of its own a device of 80 GB has 53.6 to fill."""
    hardware = replace(catalogue.hardware("dgx_h100"), rank_MB=20_000.0)
    with pytest.raises(Misfit, match=r"88\.\d GB more than the 53\.6 GB that may be filled"):
        helix.plan("llama3_70b", hardware, 1)


def test_the_nearest_number_of_devices_has_links() -> None:
    """Of one island, whose outer links nobody has stated, no layout beyond it is named."""
    hardware = replace(catalogue.hardware("dgx_h100"), host_link_GB_per_s=None)
    with pytest.raises(Misfit, match=r"^memory binds.*; nothing fits on up to"):
        helix.plan("llama3_70b", hardware, 8, mode="train", batch=1)


def test_nothing_fits_at_all() -> None:
    with pytest.raises(
        Misfit, match=r"nothing fits on up to 256 devices either; take a shorter sequence, .*recompute"
    ):
        helix.plan("llama3_70b", "l40s", 1, mode="train", batch=1, length=10**8)


def test_no_memory_at_all_is_refused() -> None:
    hardware = replace(catalogue.hardware("dgx_h100"), memory_GB_per_device=0)
    with pytest.raises(ConfigError, match=r"hardware\.memory_GB_per_device must be more than 0, or null"):
        helix.plan("smollm2", hardware, 8)


def test_latent_attention_is_refused_by_name() -> None:
    with pytest.raises(PartitionError, match=r"^model=deepseek_v3 has multi-head latent attention \(MLA\)"):
        helix.plan("deepseek_v3", "dgx_h100", 64)


def test_names_and_goals_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"there is no model=llama_70b \(did you mean llama3_70b\?\)"):
        helix.plan("llama_70b", "dgx_h100")
    with pytest.raises(ConfigError, match=r"there is no hardware=h300.*h200"):
        helix.plan("llama3_70b", "h300")
    with pytest.raises(ConfigError, match="goal=tpot is none of mode=forward; choose mode=generate, which has it, or"):
        helix.plan("llama3_70b", "dgx_h100", goal="tpot")
