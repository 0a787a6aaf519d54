"""What a student is trained for: objectives by name, and the frozen teacher that they ask.

A new objective is one file with a subclass of :class:`~skill_fairseq.objectives.objective.Objective`, and a line here
or an import of your own before training.
"""

from skill_fairseq.objectives import classification, ctc, gram, group_means, layers  # noqa: F401
