"""Functions by name, and the parameters they take."""

import pytest

from safeshape.config.naming import check_parameters, named

TABLE = {"one": 1}


def own(x, *, power=2.0, name="a"):
    return x


def anything(x, **more):
    return x


def test_a_shipped_name_or_a_users_own():
    assert named("one", TABLE, "policy") == 1
    assert named(f"{__name__}:own", TABLE, "policy") is own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (5, "an attack's name must be a string or a function, got 5"),
        ("two", "unknown attack 'two'; known: one, or your own as module:function"),
        ("no.such:f", "cannot import attack 'no.such:f'"),
        (f"{__name__}:absent", "cannot import attack"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        named(name, TABLE, "attack")


def test_parameters():
    check_parameters(own, {"power": 1, "name": "b"}, "policy 'own'", given=("x",))
    check_parameters(anything, {"whatever": 1}, "policy 'anything'", given=("x",))
    with pytest.raises(ValueError, match="policy 'own' has no parameter 'x'; it has: power, name"):
        check_parameters(own, {"x": 1}, "policy 'own'", given=("x",))
    for value in ("2", True, None):
        with pytest.raises(ValueError, match="policy 'own': parameter 'power' must be a number"):
            check_parameters(own, {"power": value}, "policy 'own'", given=("x",))
