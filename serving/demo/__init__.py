"""The main job on real data, step by step, with a report of what each step measured."""
