from flowtrain.cli import main

main()
