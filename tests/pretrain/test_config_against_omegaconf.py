"""Merging and references against OmegaConf, whose grammar they keep. It is no dependency: it judges here alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given, reject, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretrain.config.merge import _over
from pretrain.config.references import resolved

quick = settings(max_examples=200, deadline=None)
KEYS = ("a", "b", "c_d", "e-1")
plain = st.one_of(
    st.integers(-9, 9),
    st.floats(-9, 9).map(lambda x: round(x, 3)),
    st.booleans(),
    st.sampled_from(["x", "y z"]),
)
nodes = st.recursive(
    st.one_of(plain, st.none(), st.lists(plain, max_size=3)),
    lambda inner: st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
trees = st.dictionaries(st.sampled_from(KEYS), nodes, min_size=1, max_size=4)


def leaves(tree: Any, path: str = "") -> list[str]:
    """The paths of all values that are no mappings and no lists."""
    if isinstance(tree, dict):
        return [one for key, inner in tree.items() for one in leaves(inner, f"{path}.{key}" if path else key)]
    if isinstance(tree, list):
        return [f"{path}[{number}]" for number in range(len(tree))]
    return [path]


@given(trees, trees)
@quick
def test_files_and_overrides_merge_alike(below: dict[str, Any], above: dict[str, Any]) -> None:
    try:
        wanted = OmegaConf.to_container(OmegaConf.merge(below, above))
    except (
        TypeError
    ):  # a list over a mapping, or the other way round: refused there, and here by the setting's kind
        reject()
    assert _over(below, above) == wanted


@given(trees, st.data())
@quick
def test_references_lead_to_the_same_values(tree: dict[str, Any], data: st.DataObject) -> None:
    names = leaves(tree)
    if not names:
        return
    whole, part, relative = (data.draw(st.sampled_from(names)) for _ in range(3))
    values = {
        **tree,
        "whole": f"${{{whole}}}",
        "text": f"<${{{part}}}|${{ {whole} }}>",
        "near": {"sibling": 7, "same": "${.sibling}", "up": f"${{..{relative}}}"},
        "chain": ["${whole}", "${near.up}", "\\${no.reference}"],
        "name": whole.split(".")[0].split("[")[0],
        "indirect": "${${name}}",
    }
    found, problems = resolved(values)
    assert not problems
    assert found == OmegaConf.to_container(OmegaConf.create(values), resolve=True)
