"""`python -m recipes.study`; the command is a module of its own, which its worker processes can import."""

from recipes.study.command import main

if __name__ == "__main__":
    main()
