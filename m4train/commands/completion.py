"""`m4train completion SHELL`: what bash, zsh and fish need to complete commands, groups, choices and keys."""

from __future__ import annotations

from m4train.errors import ConfigError

_BASH = """_m4train() {
    local word="${COMP_LINE:0:COMP_POINT}"; word="${word##* }"
    local found; found=$(m4train completion --words "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
    COMPREPLY=($(compgen -W "$found" -- "$word"))
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#*=}")
    [[ ${COMPREPLY[0]} == *= || ${COMPREPLY[0]} == *. ]] && compopt -o nospace
}
complete -o default -F _m4train m4train
"""
_ZSH = """#compdef m4train
_m4train() {
    local -a found; found=(${(f)"$(m4train completion --words "${BUFFER[1,CURSOR]}" 2>/dev/null)"})
    compadd -S '' -- $found
}
compdef _m4train m4train
"""
_FISH = """complete -c m4train -f -a '(m4train completion --words (commandline -cp) 2>/dev/null)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(shell: str | None, line: str | None) -> int:
    """Prints the script of a shell, or the words that may stand at the end of a line; returns 0. Raises ConfigError for another
    shell."""
    if line is not None:
        print(*words(line), sep="\n")
        return 0
    if shell not in SCRIPTS:
        raise ConfigError(
            f"completion takes a shell, {', '.join(SCRIPTS)}: source <(m4train completion bash), or m4train completion fish | source."
        )
    print(SCRIPTS[shell], end="")
    return 0


def words(line: str) -> list[str]:
    """What the last word of a command line may become."""
    before, _, last = line.rpartition(" ")
    given = before.split()[1:]
    from m4train.cli import COMMANDS

    commands = [name for name in COMMANDS if not given or name.startswith(" ".join(given) + " ")]
    if not given or (len(given) == 1 and commands):
        return sorted({name.split()[len(given)] for name in commands if name.split()[len(given)].startswith(last)})
    from m4train.config.compose import HERE, groups
    from m4train.config.describe import all_keys

    group, equals, start = last.partition("=")
    if equals:
        return [f"{group}={choice}" for choice in groups(HERE).get(group, []) if choice.startswith(start)]
    found = [f"{name}=" for name in groups(HERE)] + [f"{key.name}=" for key in all_keys() if not key.group]
    return [name for name in dict.fromkeys(found) if name.startswith(last) and "NAME" not in name]
