from ptmoe.cli import main

main()
