"""`python -m keras_ebft`, the same as the command `keras-ebft`."""

import sys

from keras_ebft.cli import main

sys.exit(main())
