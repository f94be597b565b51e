from thyme.cli import main

main()
