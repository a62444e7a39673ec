import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax import sharding
from qwen_jax.sharding import Rules, make_mesh

MESHES = ("expert=8", "expert=2,tensor=2", "data=2,expert=2,tensor=2")


# ---- rules -----------------------------------------------------------------------------------


def test_rules_take_one_axis_or_several_and_forget_empty_ones():
    rules = Rules.of({"K": "tensor"}, E=("expert", "data"), N=())
    assert rules.axes("E") == ("expert", "data")
    assert rules.axes("K") == ("tensor",)
    assert rules.axes("N") == rules.axes("D") == ()


def test_rules_are_equal_and_hash_alike_in_any_order():
    one, other = Rules.of(E="expert", V="tensor"), Rules.of(V="tensor", E="expert")
    assert one == other
    assert hash(one) == hash(other)


def test_replicating_a_letter_leaves_the_others():
    rules = sharding.STRATEGIES["ep+tp"].replicate("K", "E")
    assert rules.axes("K") == rules.axes("E") == ()
    assert rules.axes("N") == ("tensor",)


def test_rules_print_as_they_are_read():
    assert str(Rules.of(V="tensor", E=("expert", "data"))) == "E->expert+data, V->tensor"
    assert str(Rules()) == "all replicated"


@pytest.mark.parametrize("letter", ["e", "heads", "", "E D"])
def test_rules_for_what_is_no_letter_raise(letter):
    with pytest.raises(ValueError, match=r"not in the glossary|not one dimension letter"):
        Rules.of({letter: "tensor"})
    if letter not in ("", "E D"):
        with pytest.raises(ValueError, match="not in the glossary"):
            Rules().replicate(letter)


def test_a_strategy_is_a_name_or_rules():
    assert sharding.strategy("auto") == sharding.STRATEGIES["ep+tp"]
    assert sharding.strategy("tp").axes("E") == ()
    mine = Rules.of(D="data")
    assert sharding.strategy(mine) is mine
    with pytest.raises(ValueError, match=r"strategy 'dp' is unknown; named ones: auto, .*tp, ep"):
        sharding.strategy("dp")


# ---- meshes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["expert=4, tensor=2", {"expert": 4, "tensor": 2}])
def test_a_mesh_has_all_axes_and_auto_types(given):
    mesh = make_mesh(given)
    assert dict(mesh.shape) == {"data": 1, "expert": 4, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_auto_puts_every_device_on_the_expert_axis():
    assert dict(make_mesh("auto").shape) == {"data": 1, "expert": 8, "tensor": 1}
    assert dict(make_mesh("auto", jax.devices()[:3]).shape)["expert"] == 3


def test_a_smaller_mesh_takes_the_first_devices():
    assert make_mesh("tensor=2").devices.ravel().tolist() == jax.devices()[:2]
    chosen = jax.devices()[4:]
    assert make_mesh("tensor=2", chosen).devices.ravel().tolist() == chosen[:2]


def test_a_ready_mesh_keeps_devices_and_names_but_not_explicit_types():
    given = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    mesh = make_mesh(given)
    assert mesh.axis_names == ("data", "heads")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert (mesh.devices == given.devices).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pipe=2", "mesh axis pipe=2: use positive sizes of data, expert, tensor"),
        ("expert=0", "mesh axis expert=0"),
        ("expert", "'expert' is not AXIS=SIZE"),
        ("expert=x", "'expert=x' is not AXIS=SIZE"),
        ("", "'' is not AXIS=SIZE"),
        ("expert=2,expert=4", "'expert=4' is not AXIS=SIZE of a new axis"),
        ({"expert": 2.0}, r"mesh axis expert=2\.0"),
        ({"expert": -1}, "mesh axis expert=-1"),
        ("expert=4,tensor=4", "needs 16 devices, 8 are here"),
    ],
)
def test_an_impossible_mesh_raises(given, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(given)


# ---- specs -----------------------------------------------------------------------------------

RULES = Rules.of(E="expert", N="tensor", F="tensor", V=("expert", "tensor"))


def test_a_spec_looks_every_letter_up_on_its_own():
    mesh = make_mesh("expert=4,tensor=2")
    assert sharding.spec("E P D F", mesh, RULES) == PartitionSpec("expert", None, None, "tensor")
    assert sharding.spec("D V", mesh, RULES) == PartitionSpec(None, ("expert", "tensor"))
    assert sharding.spec(". N .", mesh, RULES) == PartitionSpec(None, "tensor", None)


def test_mesh_axes_of_size_one_do_not_appear():
    assert sharding.spec("E P D F", make_mesh("tensor=2"), RULES)[0] is None
    assert sharding.spec("D V", make_mesh("expert=2"), RULES) == PartitionSpec(None, "expert")


def test_a_size_that_does_not_divide_raises_with_name_letter_and_numbers():
    mesh = make_mesh("expert=4,tensor=2")
    sizes = {"D": 6, "V": 12, "N": 3}
    with pytest.raises(ValueError, match=r"head: V=12 does not split over expert\+tensor=8"):
        sharding.spec("D V", mesh, RULES, sizes, "head")
    with pytest.raises(ValueError, match=r"N=3 .*tensor=2.*rules\.replicate\('N'\)"):
        sharding.spec("N D", mesh, RULES, sizes)
    assert sharding.spec("N D", make_mesh("expert=4"), RULES, sizes) == PartitionSpec(None, None)


def test_a_mesh_axis_used_twice_raises_unless_it_has_size_one():
    with pytest.raises(ValueError, match=r"q: dims 'N F' use mesh axes \['tensor'\] twice"):
        sharding.spec("N F", make_mesh("tensor=2"), RULES, name="q")
    assert sharding.spec("N F", make_mesh("expert=2"), RULES) == PartitionSpec(None, None)


def test_an_unknown_letter_is_not_quietly_replicated():
    with pytest.raises(ValueError, match="not in the glossary"):
        sharding.spec("T heads", make_mesh("tensor=2"), RULES)


def test_rules_that_name_an_axis_the_mesh_lacks_raise():
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    with pytest.raises(ValueError, match=r"mesh axes \['tensor'\]; this mesh has \['expert'\]"):
        sharding.spec("N D", mesh, RULES)


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "split"),
    [("tensor=4", 8, True), ("tensor=8", 8, True), ("tensor=8", 4, False), ("tensor=8", 2, False)],
)
def test_kv_heads_are_replicated_when_there_are_fewer_than_ways(mesh, kv_heads, split):
    rules = sharding.replicate_kv(sharding.STRATEGIES["tp"], make_mesh(mesh), kv_heads)
    assert rules.axes("K") == (("tensor",) if split else ())
    assert rules.axes("N") == ("tensor",)


@pytest.mark.parametrize("kv_heads", [3, 6, 12])
def test_kv_heads_that_neither_split_nor_divide_raise(kv_heads):
    with pytest.raises(ValueError, match=f"K={kv_heads} kv heads neither .*tensor=8; use"):
        sharding.replicate_kv(sharding.STRATEGIES["tp"], make_mesh("tensor=8"), kv_heads)


# ---- arrays ----------------------------------------------------------------------------------


def test_constrain_lays_an_activation_out_and_changes_no_value():
    mesh, rules = make_mesh("expert=2,tensor=4"), Rules.of(T="expert", N="tensor")
    x = jnp.arange(6 * 8 * 3.0).reshape(6, 8, 3)
    y = jax.jit(lambda x: sharding.constrain(x, "T N .", mesh, rules))(x)
    wanted = NamedSharding(mesh, PartitionSpec("expert", "tensor"))
    assert y.sharding.is_equivalent_to(wanted, 3)
    np.testing.assert_array_equal(x, y)


def test_constrain_names_the_letter_that_does_not_split():
    with pytest.raises(ValueError, match="activation: N=6 does not split over tensor=4"):
        sharding.constrain(jnp.ones((2, 6)), "T N", make_mesh("tensor=4"), Rules.of(N="tensor"))


def test_on_one_device_nothing_is_constrained_or_mapped():
    mesh, x = make_mesh("expert=1"), jnp.ones((3, 5))
    assert sharding.constrain(x, "T N", mesh, Rules.of(N="expert")) is x
    fn = lambda x: x
    assert sharding.per_shard(fn, mesh, PartitionSpec(), PartitionSpec()) is fn


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("axes", [("expert",), ("tensor", "expert"), ("data", "expert", "tensor")])
def test_a_shard_knows_which_piece_it_holds_and_sums_over_all(mesh, axes):
    mesh = make_mesh(mesh)
    n = sharding.ways(mesh, axes)
    pieces = jnp.arange(n * 3).reshape(n * 3)

    def local(piece):
        index = sharding.shard_index(mesh, axes)
        right = (piece == index * 3 + jnp.arange(3)).all()
        return sharding.reduce_over(jnp.stack([right.astype(jnp.int32), piece.sum()]), mesh, axes)

    out = sharding.per_shard(local, mesh, PartitionSpec(axes), PartitionSpec())(pieces)
    np.testing.assert_array_equal(out, [n, pieces.sum()])
