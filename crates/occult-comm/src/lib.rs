//! Moves rows between ranks: collective calls with bounded waits over threads or MPI.
