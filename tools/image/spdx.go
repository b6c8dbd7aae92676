package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"strings"
)

// The parts of an SPDX 2.3 document that we fill in (https://spdx.github.io/spdx-spec/v2.3/).
type (
	document struct {
		Version       string         `json:"spdxVersion"`
		License       string         `json:"dataLicense"`
		ID            string         `json:"SPDXID"`
		Name          string         `json:"name"`
		Namespace     string         `json:"documentNamespace"`
		Creation      creation       `json:"creationInfo"`
		Packages      []spdxPackage  `json:"packages"`
		Relationships []relationship `json:"relationships"`
	}
	creation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		ID        string         `json:"SPDXID"`
		Name      string         `json:"name"`
		Version   string         `json:"versionInfo,omitempty"`
		Location  string         `json:"downloadLocation"`
		Analyzed  bool           `json:"filesAnalyzed"`
		Declared  string         `json:"licenseDeclared"`
		Concluded string         `json:"licenseConcluded"`
		Copyright string         `json:"copyrightText"`
		Purpose   string         `json:"primaryPackagePurpose,omitempty"`
		FileName  string         `json:"packageFileName,omitempty"`
		Checksums []spdxChecksum `json:"checksums,omitempty"`
		Refs      []spdxRef      `json:"externalRefs,omitempty"`
		Comment   string         `json:"comment,omitempty"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	relationship struct {
		From string `json:"spdxElementId"`
		Type string `json:"relationshipType"`
		To   string `json:"relatedSpdxElement"`
	}
)

const noAssertion = "NOASSERTION"

// spdx writes an image's bill of materials: the Go modules that the programs themselves say they were linked from, and
// the distribution packages that files were taken from. It claims no more than it knows: licences of others are not
// judged, the packages' own statements are in the image.
func spdx(o options, im image, arch string, programs map[string]binary, debs []*deb) ([]byte, error) {
	doc := document{
		Version: "SPDX-2.3", License: "CC0-1.0", ID: "SPDXRef-DOCUMENT", Name: "mistnet-" + im.name + "-" + arch,
		Creation: creation{o.created.Format("2006-01-02T15:04:05Z"), []string{"Tool: mistnet-tools-image"}},
	}
	root := spdxPackage{
		ID: "SPDXRef-image", Name: o.hub + "/" + im.name, Version: o.version, Location: noAssertion, Declared: im.licenses,
		Concluded: noAssertion, Copyright: noAssertion, Purpose: "CONTAINER",
	}
	doc.Packages = append(doc.Packages, root)
	doc.relate(doc.ID, "DESCRIBES", root.ID)
	modules := make(map[string]bool)
	for _, at := range slices.Sorted(maps.Keys(programs)) {
		b := programs[at]
		program := spdxPackage{
			ID: "SPDXRef-program" + spdxID(at), Name: b.info.Path, Version: o.version, Location: noAssertion,
			Declared: "Apache-2.0", Concluded: noAssertion, Copyright: noAssertion, Purpose: "APPLICATION", FileName: at,
			Checksums: []spdxChecksum{{"SHA256", fmt.Sprintf("%x", sha256.Sum256(b.data))}},
		}
		doc.Packages = append(doc.Packages, program)
		doc.relate(root.ID, "CONTAINS", program.ID)
		deps := []*debug.Module{{Path: "stdlib", Version: strings.TrimPrefix(b.info.GoVersion, "go")}}
		for _, m := range append(deps, b.info.Deps...) {
			if m.Replace != nil {
				m = m.Replace
			}
			id := "SPDXRef-go-" + spdxID(m.Path+"-"+m.Version)
			if !modules[id] {
				modules[id] = true
				doc.Packages = append(doc.Packages, spdxPackage{
					ID: id, Name: m.Path, Version: m.Version, Location: noAssertion, Declared: noAssertion, Concluded: noAssertion,
					Copyright: noAssertion, Purpose: "LIBRARY",
					Refs: []spdxRef{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + m.Path + "@" + m.Version}},
				})
			}
			doc.relate(program.ID, "STATIC_LINK", id)
		}
	}
	distribution := osID()
	for _, d := range debs {
		id := "SPDXRef-deb-" + spdxID(d.name)
		doc.Packages = append(doc.Packages, spdxPackage{
			ID: id, Name: d.name, Version: d.version, Location: noAssertion, Declared: noAssertion, Concluded: noAssertion,
			Copyright: noAssertion, Comment: "its licences: /usr/share/doc/" + d.name + "/copyright in the image",
			Refs: []spdxRef{{"PACKAGE-MANAGER", "purl", fmt.Sprintf("pkg:deb/%s/%s@%s?arch=%s", distribution, d.name, d.version, d.arch)}},
		})
		doc.relate(root.ID, "CONTAINS", id)
	}
	content, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	// Unique for every content and the same for the same one, which a random id would not be.
	doc.Namespace = fmt.Sprintf("%s/sbom/%s-%s-%x", source, im.name, arch, sha256.Sum256(content))
	if content, err = json.MarshalIndent(doc, "", " "); err != nil {
		return nil, err
	}
	return append(content, '\n'), nil
}

func (d *document) relate(from, how, to string) {
	d.Relationships = append(d.Relationships, relationship{from, how, to})
}

// spdxID maps s to the characters an SPDX identifier may have: letters, digits, full stop and minus.
func spdxID(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '-':
			return r
		}
		return '-'
	}, s)
}

// osID is the distribution whose packages this machine's apt knows, as os-release(5) names it.
func osID() string {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "debian"
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "ID="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return "debian"
}
