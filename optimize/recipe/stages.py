"""The `stages` of a recipe: which method each block means, what it builds on, and its config."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from optimize import stages as registry
from optimize.config import Block
from optimize.errors import OptimizeError
from optimize.recipe import SOURCE, Stage, check_name
from optimize.recipe.blocks import did_you_mean, read_block, show
from optimize.recipe.text import Text, Trail

COMMON = ("name", "from", "backend")
"""Keys that every stage may have besides its verb and its method's own."""
MAX_STAGES = 100


@dataclass
class _Draft:
    """A stage as far as it could be understood."""

    index: int
    source: str
    """The format of the source model."""
    verb: str = ""
    method: str = ""
    name: str = ""
    parent: str | None = None
    candidates: tuple[registry.Entry, ...] = ()
    entry: registry.Entry | None = None
    config: Block | None = None

    @property
    def trail(self) -> Trail:
        return ("stages", self.index)

    @property
    def gives(self) -> str | None:
        """The format of its artifact, where that is certain."""
        formats = {entry.gives for entry in ([self.entry] if self.entry else self.candidates)}
        return formats.pop() if len(formats) == 1 else None


def read_stages(text: Text, blocks: Any, source: str) -> tuple[tuple[Stage, ...] | None, tuple[str, ...] | None]:
    """The stages (None where one of them has a mistake), and the names that other blocks may use (None: not known).

    `source` is the format of the source model.
    """
    if not isinstance(blocks, list):
        return None, None
    before = len(text.diagnostics)
    drafts: list[_Draft] = []
    for index, block in enumerate(blocks[:MAX_STAGES]):
        draft = _Draft(index, source)
        if not isinstance(block, dict):
            text.report(draft.trail, f"a stage is a mapping such as `export: onnx`, got {show(block)}")
        else:
            _read_method(text, draft, block)
            _read_name(text, draft, block, drafts)
            _read_parent(text, draft, block, drafts)
            _choose_entry(text, draft, block, drafts)
            _read_config(text, draft, block)
            _check_settings(text, draft, drafts)
            _check_reads(text, draft, drafts)
            _check_libraries(text, draft)
        drafts.append(draft)
    names = tuple(dict.fromkeys(draft.name for draft in drafts if draft.name))
    if len(text.diagnostics) > before:
        return None, names
    made = tuple(
        Stage(
            *(draft.index, draft.verb, draft.method, draft.name, draft.parent, draft.entry, draft.config),
            location=text.location(("stages", draft.index)),
        )
        for draft in drafts
        if draft.parent and draft.entry and draft.config
    )
    return made, names


def _read_method(text: Text, draft: _Draft, block: dict[str, Any]) -> None:
    verbs = [key for key in block if key in registry.VERBS]
    if len(verbs) != 1:
        hint = f"one of {', '.join(registry.VERBS)}"
        if verbs:
            message = f"a stage has one verb; this one has {' and '.join(f'`{verb}`' for verb in verbs)}"
            text.report((*draft.trail, verbs[1]), message, "make them two stages", key=True)
            return
        unknown = next((key for key in block if key not in COMMON), None)
        guess = did_you_mean(unknown, registry.VERBS) if unknown else None
        place: Trail = (*draft.trail, unknown) if unknown else draft.trail
        text.report(place, "a stage needs a verb, such as `export: onnx`", guess or hint, key=True)
        return
    draft.verb = verbs[0]
    method = block[draft.verb]
    trail = (*draft.trail, draft.verb)
    if not isinstance(method, str):
        text.report(trail, f"expected the name of a method, got {show(method)}", f"such as {_known(draft.verb)}")
        return
    draft.candidates = registry.find(draft.verb, method)
    if draft.candidates:
        draft.method = method
        return
    guess = did_you_mean(method, registry.methods(draft.verb)) or "see `optimize stages`"
    if other := next((verb for verb in registry.VERBS if registry.find(verb, method)), None):
        guess = f"did you mean `{other}: {method}`?"
    text.report(trail, f"`{draft.verb}` has no method `{method}`", guess)


def _known(verb: str) -> str:
    return ", ".join(f"`{verb}: {method}`" for method in registry.methods(verb)) or "those of `optimize stages`"


def _read_name(text: Text, draft: _Draft, block: dict[str, Any], earlier: list[_Draft]) -> None:
    """Its name, also where that is a mistake or the verb is: what refers to it is no second mistake."""
    name: Any = block.get("name")
    if name is None:
        key = draft.verb or next((key for key in block if key not in COMMON), "")
        name = block.get(key)
        trail, hint = (*draft.trail, key), "give it a `name:`"
    else:
        trail, hint = (*draft.trail, "name"), "choose another name"
        if fault := _name_fault(name):
            text.report(trail, fault)
    if not name or not isinstance(name, str):
        return
    draft.name = name
    if not draft.verb:
        return
    if name == SOURCE:
        text.report(trail, f"`{SOURCE}` is the name of the source model", hint)
    for other in earlier:
        if other.name == name:
            text.report(trail, f"stages[{other.index}] is named `{name}` too", hint)
            break


def _name_fault(name: Any) -> str | None:
    if not isinstance(name, str):
        return f"expected a string, got {show(name)}"
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return None


def _read_parent(text: Text, draft: _Draft, block: dict[str, Any], earlier: list[_Draft]) -> None:
    parent = block.get("from")
    if parent is None:
        draft.parent = (earlier[-1].name or None) if earlier else SOURCE
        return
    trail = (*draft.trail, "from")
    if not isinstance(parent, str):
        text.report(trail, f"expected the name of a stage, got {show(parent)}")
    elif _check_earlier(text, parent, trail, draft, [SOURCE, *(other.name for other in earlier)]):
        draft.parent = parent


def _check_earlier(text: Text, name: str, trail: Trail, draft: _Draft, names: list[str]) -> bool:
    known = [known for known in names if known]
    if name in known:
        return True
    if name == draft.name:
        text.report(trail, f"the stage `{name}` can't build on itself")
    else:
        text.report(trail, f"no earlier stage is named `{name}`", did_you_mean(name, known))
    return False


def _choose_entry(text: Text, draft: _Draft, block: dict[str, Any], earlier: list[_Draft]) -> None:
    """The back end: the one asked for, or the one that takes the format of the input."""
    backend = block.get("backend")
    serving = draft.candidates
    if not serving:
        return
    if backend is not None:
        serving = tuple(entry for entry in serving if entry.backend == backend)
        if not serving:
            known = [entry.backend for entry in draft.candidates if entry.backend]
            hint = did_you_mean(backend, known) if known else "leave `backend` out: there is no choice"
            message = f"`{draft.verb}: {draft.method}` has no back end {show(backend)}"
            text.report((*draft.trail, "backend"), message, hint)
            serving = draft.candidates
    given = _format_of(draft, earlier)
    fitting = tuple(entry for entry in serving if given in entry.takes) if given else serving
    if not fitting:
        _report_order(text, draft, serving, str(given), earlier)
        fitting = serving
    if len(fitting) > 1:
        fitting = _of_mode(fitting, block.get("mode")) or _of_mode(fitting, None) or fitting
    ours = tuple(entry for entry in fitting if entry.backend is None)
    if len(fitting) == 1:
        draft.entry = fitting[0]
    elif backend is None and given and len(ours) == 1:
        draft.entry = ours[0]
    elif given in {form for entry in fitting for form in entry.takes}:
        backends = ", ".join(f"`backend: {entry.backend}`" for entry in fitting)
        text.report((*draft.trail, draft.verb), "several back ends could do this", f"choose one: {backends}")


def _of_mode(entries: tuple[registry.Entry, ...], mode: Any) -> tuple[registry.Entry, ...]:
    """Those that are for this `mode` alone; None: for all that no other is for."""
    return tuple(entry for entry in entries if entry.mode == mode)


def _format_of(draft: _Draft, earlier: list[_Draft]) -> str | None:
    """Of what a stage builds on."""
    if draft.parent == SOURCE:
        return draft.source
    return next((other.gives for other in earlier if other.name == draft.parent), None)


def _report_order(
    text: Text, draft: _Draft, serving: tuple[registry.Entry, ...], given: str, earlier: list[_Draft]
) -> None:
    wanted = {form for entry in serving for form in entry.takes}
    giver = "the source model is" if draft.parent == SOURCE else f"stage `{draft.parent}` gives"
    bridges = [entry for entry in registry.entries() if given in entry.takes and entry.gives in wanted]
    bridge = min(bridges, key=lambda entry: entry.verb != "export", default=None)
    source = [SOURCE] if draft.source in wanted else []
    forks = [*source, *(other.name for other in earlier if other.gives in wanted and other.name)]
    hint = None
    if bridge:
        hint = f"put `- {bridge.verb}: {bridge.method}` before it"
    elif forks:
        hint = f"say `from: {forks[-1]}`, or move it up"
    takes = " or ".join(sorted(wanted))
    message = f"`{draft.verb}: {draft.method}` takes {takes}, but {giver} {given}"
    text.report((*draft.trail, draft.verb), message, hint, key=True)


def _read_config(text: Text, draft: _Draft, block: dict[str, Any]) -> None:
    common = (draft.verb, *COMMON)
    rest = {key: value for key, value in block.items() if key not in common}
    if draft.entry is None:
        return
    try:
        model = draft.entry.load().Config
    except (ImportError, OptimizeError) as error:
        text.report((*draft.trail, draft.verb), f"`{draft.verb}: {draft.method}` can't be loaded: {error}", _pip(draft))
        return
    draft.config = read_block(text, model, rest, draft.trail, also=common)


def _check_settings(text: Text, draft: _Draft, earlier: list[_Draft]) -> None:
    """Settings that only some formats allow, such as `method: script`."""
    given = _format_of(draft, earlier)
    if draft.entry is None or draft.config is None or given is None:
        return
    for setting, formats in draft.entry.only.items():
        field, _, value = setting.partition(": ")
        if str(getattr(draft.config, field)) == value and given not in formats:
            text.report((*draft.trail, field), f"`{setting}` takes {' or '.join(formats)}, and not {given}")


def _check_reads(text: Text, draft: _Draft, earlier: list[_Draft]) -> None:
    """Fields such as `teacher` name earlier stages, of a format that the method takes."""
    if draft.entry is None or draft.config is None:
        return
    known = [SOURCE, *(other.name for other in earlier)]
    wanted = dict.fromkeys(form for entry in draft.candidates for form in entry.takes)
    for field in draft.entry.reads:
        named, trail = getattr(draft.config, field), (*draft.trail, field)
        if named is None or not _check_earlier(text, named, trail, draft, known):
            continue
        given = draft.source if named == SOURCE else next(other.gives for other in earlier if other.name == named)
        if given is not None and given not in wanted:
            fitting = [other.name for other in earlier if other.gives in wanted and other.name]
            hint = f"such as `{field}: {fitting[-1]}`" if fitting else None
            text.report(trail, f"`{named}` is {given}, and the {field} has to be {' or '.join(wanted)}", hint)


def _check_libraries(text: Text, draft: _Draft) -> None:
    for field, (name, extra) in draft.entry.options.items() if draft.entry and draft.config else ():
        if getattr(draft.config, field) is not None and not installed(name):
            message = f"`{field}` needs {name}, which is not installed"
            text.report((*draft.trail, field), message, f'pip install "optimize-workbench[{extra}]"', key=True)
    missing = [name for name in (draft.entry.needs if draft.entry else ()) if not installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        message = f"`{draft.verb}: {draft.method}` needs {' and '.join(missing)}, which {verb} not installed"
        text.report((*draft.trail, draft.verb), message, _pip(draft))


def installed(distribution: str) -> bool:
    """Whether a distribution is there, as far as its metadata says; nothing is imported."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _pip(draft: _Draft) -> str:
    entry = draft.entry
    if entry and entry.extra:
        return f'pip install "optimize-workbench[{entry.extra}]"'
    return "pip install " + " ".join(entry.needs if entry else ())
