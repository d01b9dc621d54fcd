"""Where a line of the table belongs in a figure: what was attacked and measured, apart from the defence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from safeshape.report.rows import Key

UNATTACKED = "none"
MEASURED = ("dataset", "decoding", "threshold")  # settings of `safeshape eval` that say how a number was measured
OF_DEFENCE = ("kl",)  # settings that are a defence's own, and tell lines apart rather than panels
_SPELT = {"harmful_share": ("ratio", "safe_ratio"), "kl": ("kl",)}  # a setting's name among an attack's, a defence's


@dataclass(frozen=True, kw_only=True)
class Place:
    """A panel: everything that its lines have in common. `settings`: sorted pairs."""

    attack: str
    model: str
    judge: str = ""
    settings: tuple[tuple[str, float | str], ...] = ()


def place_of(key: Key, *, without: Sequence[str] = ()) -> Place:
    """The panel of a key when the settings `without` are on its axes."""
    kept = tuple((name, value) for name, value in key.settings if name not in (*without, *OF_DEFENCE))
    return Place(attack=key.attack, model=key.model, judge=key.judge, settings=kept)


def along(key: Key, setting: str) -> Key:
    """The key as its figure names it when that setting is an axis: without the setting's value in its names.

    Shares of harmful rows: also without the share of safe rows, where the two make up the whole.
    """
    parameters = list(dict.fromkeys((setting, *_SPELT.get(setting, ())[:1])))
    shares = [dict(_words(key.attack)).get(name) for name in _SPELT["harmful_share"]]
    if setting == "harmful_share" and _whole(shares):
        parameters.append("safe_ratio")
    return replace(key, attack=_without(key.attack, parameters), defence=_without(key.defence, parameters))


def named(key: Key, setting: str = "") -> str:
    """A line's name: the defence, and those of its settings that its name does not say and no axis shows."""
    own = [(name, value) for name, value in key.settings if name in OF_DEFENCE and name != setting]
    rest = [_named(name, value) for name, value in own if f" {name}=" not in key.defence]
    return f"{key.defence} ({', '.join(rest)})" if rest else key.defence


def before(key: Key, place: Place) -> bool:
    """Whether the key is of the place's model before any attack, with no other setting than the place's."""
    here = dict(place.settings)
    same = all(here.get(name, value) == value for name, value in key.settings)
    return key.attack == UNATTACKED and (key.model, key.judge) == (place.model, place.judge) and same


def told_apart(places: Sequence[Place]) -> list[str]:
    """For each place, in words: its attack, and what tells it from the others.

    The model stands there where it differs, judge and settings where the rest does not tell two places apart.
    """
    names = list(dict.fromkeys(name for place in places for name, _ in place.settings))
    settings = [dict(place.settings) for place in places]
    attacks, models = [place.attack for place in places], [place.model for place in places]
    columns = [attacks, *([models] if len(set(models)) > 1 else [])]
    more = [[place.judge for place in places]]
    more += [[_named(name, found.get(name)) for found in settings] for name in names]
    for place in reversed(range(len(more))):
        if len(set(zip(*columns, *more[:place], *more[place + 1 :], strict=True))) == len(set(places)):
            del more[place]
    return [", ".join(part for part in parts if part) for parts in zip(*columns, *more, strict=True)]


def _named(name: str, value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def _words(name: str) -> list[tuple[str, str]]:
    """The parameters in a name such as `mixed ratio=0.1`."""
    return [(word.partition("=")[0], word.partition("=")[2]) for word in name.split(" ") if "=" in word]


def _without(name: str, parameters: Sequence[str]) -> str:
    return " ".join(word for word in name.split(" ") if "=" not in word or word.partition("=")[0] not in parameters)


def _whole(shares: Sequence[str | None]) -> bool:
    try:
        return abs(sum(float(share or "") for share in shares) - 1) < 1e-9
    except ValueError:
        return False
