"""The parts of `train_subject.py`: its corpus, its figures and its model card."""
