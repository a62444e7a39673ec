"""A strategy as a table and a picture, against weights that were made."""

import pytest
import tiny
import treescope
from jax.sharding import AbstractMesh, PartitionSpec

from qwen_jax.engine.capacity import weight_bytes
from qwen_jax.runtime import Runtime
from qwen_jax.sharding import AXES, make_mesh, strategy
from qwen_jax.weights import checkpoint
from qwen_jax.weights.layout import Layout, layout_of


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    found = {}
    for variant in ("moe", "moe_fp8_whole_blocks"):
        directory = tiny.write(tmp_path_factory.mktemp(variant), variant)
        found[variant] = checkpoint.read_config(checkpoint.resolve(str(directory)))
    return found


def layout(configs, variant="moe", mesh="expert=4,tensor=2", name="ep+tp") -> Layout:
    return layout_of(configs[variant], make_mesh(mesh), strategy(name), "float32")


@pytest.mark.parametrize("variant", ["moe", "moe_fp8_whole_blocks"])
def test_the_table_counts_the_bytes_of_a_device(configs, variant):
    made = layout(configs, variant)
    runtime = Runtime.make(mesh=made.mesh, strategy=made.rules, dtype="float32")
    assert made.bytes == weight_bytes(configs[variant], runtime)  # which test_planner makes
    assert str(made).splitlines()[-1].endswith(f"{made.bytes / 1e6:,.3f}")


def test_the_table_says_how_each_parameter_is_split(configs):
    lines = {line.split()[0]: line for line in str(layout(configs)).splitlines()}
    text = configs["moe"].text
    experts = lines["model.layers.*.mlp.experts.{E}.down_proj.weight"]
    assert f" {text.num_hidden_layers} " in experts
    assert "E->expert, F->tensor" in experts
    each = text.num_experts * text.moe_intermediate_size * text.hidden_size * 4 // 8
    assert experts.endswith(f"{text.num_hidden_layers * each / 1e6:,.3f}")
    assert " whole " in lines["model.norm.weight"]
    assert lines["mesh"] == "mesh data=1, expert=4, tensor=2"


def test_a_parameter_is_drawn_part_by_part(configs, capsys):
    layout(configs).draw("experts.{E}.down_proj")
    drawn = capsys.readouterr().out
    assert [drawn.count(f"CPU {i} ") for i in range(8)] == [1] * 8
    layout(configs).draw("model.norm")  # whole: every device holds all of it
    assert "CPU 0,1,2,3,4,5,6,7" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The chararray class")  # treescope looks at all of NumPy
def test_a_parameter_is_a_figure_for_notebooks(configs, monkeypatch):
    made, seen = layout(configs), []
    real = treescope.render_array_sharding
    monkeypatch.setattr(
        treescope, "render_array_sharding", lambda array: seen.append(array) or real(array)
    )
    assert made.figure("experts.{E}.down_proj")._repr_html_()
    (array,) = seen
    assert array.shape == (4, 2)
    assert array.sharding.spec == PartitionSpec("expert", "tensor")


def test_what_cannot_be_drawn_is_refused(configs):
    with pytest.raises(ValueError, match=r"'down' is the name of \d+ parameters|0 parameters"):
        layout(configs).draw("nothing_of_the_kind")
    with pytest.raises(ValueError, match=r"'norm' is the name of \d parameters; use one of model"):
        layout(configs).draw("norm")
    abstract = AbstractMesh((1, 4, 2), AXES)
    made = layout_of(configs["moe"], abstract, strategy("ep+tp"))
    assert "E->expert" in str(made)
    with pytest.raises(ValueError, match="without devices cannot be drawn"):
        made.draw("down_proj")
