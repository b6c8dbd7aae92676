package parking

// NewLooking is New with another interval between looks at the clock.
var NewLooking = newLot
