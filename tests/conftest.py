import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
