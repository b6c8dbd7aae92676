package record

// UpdateAfter makes s take its next key after n records.
func UpdateAfter(s *Sealer, n uint64) { s.limit = n }

// SetSequence makes the next record of o the n-th.
func SetSequence(o *Opener, n uint64) { o.d.seq = n }
