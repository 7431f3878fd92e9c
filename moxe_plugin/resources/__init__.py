"""Files beside the code: the recipes and the evaluation tasks."""

from moxe_plugin.resources.directory import resource_dir as resource_dir
