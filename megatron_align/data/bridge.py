"""Stands in for what sources and templates are about to offer; goes away with their new interfaces."""

from megatron_align.data import sources, templates

if hasattr(sources, "expand"):
    from megatron_align.data.sources import expand, read_file
    from megatron_align.data.templates import Template

    def kind_of(shape):
        return shape.kind
else:

    def expand(path):
        return [path]

    def read_file(path, shape=None, on_bad=None):
        return sources.read_file(path)

    def Template(tokenizer, chat_template=None):
        return templates.Template(tokenizer)

    def kind_of(shape):
        return getattr(shape, "kind", "chat")
