"""Makes TensorFlow impossible to import, from when this module is imported."""

import sys

BLOCKED = ("tensorflow", "tensorflow_text", "tf_keras")

# Importing a module that is None raises, and so does whatever lies in it; those who
# only ask whether there is such a module are told that there is none.
sys.modules.update(dict.fromkeys(BLOCKED))
