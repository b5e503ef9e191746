"""`python -m lmm_qa` is the command `lmm-qa`."""

from lmm_qa.cli.app import main

if __name__ == "__main__":
    main()
