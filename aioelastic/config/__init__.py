"""Files that say what is to run. In: the path of a Procfile, or of a file with variables. Out: frozen values, or one
error that names the file and the line. Never here: anything that runs what they say."""

from ._env_file import read_env
from ._procfile import NAME, PORT_MAX, SHELL, Process, commands, read_procfile
from ._text_file import place

__all__ = ["NAME", "PORT_MAX", "SHELL", "Process", "commands", "place", "read_env", "read_procfile"]
