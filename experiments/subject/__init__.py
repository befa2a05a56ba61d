"""The parts of `train_subject.py`: corpus, recipe, figures and model card."""
