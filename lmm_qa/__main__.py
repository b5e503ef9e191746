"""`python -m lmm_qa` is the command `lmm-qa`."""

from lmm_qa.cli import main

if __name__ == "__main__":
    main()
