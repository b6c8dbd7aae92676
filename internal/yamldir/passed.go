package yamldir

// Passed are the objects of a file whose kinds this package does not decode, in order; their Value is nil.
func Passed(file string, content []byte) []Object {
	var passed []Object
	for _, doc := range parse(file, content) {
		if doc.ignored != "" {
			passed = append(passed, doc.Object)
		}
	}
	return passed
}
