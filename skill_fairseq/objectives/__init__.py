"""Training objectives by name, and the frozen teacher that they compare the student with.

To add one, write a file with a subclass of :class:`~skill_fairseq.objectives.objective.Objective`, and import it here
or in your own code before training.
"""

from skill_fairseq.objectives import classification, ctc, gram, group_means, layers, masked_units  # noqa: F401
