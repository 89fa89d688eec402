"""The lesson on skip connections, measured on real images: `python -m flax_resnet.lesson`.

`measure` computes every number, `figures` draws them; docs/lesson.md tells the story.
"""
